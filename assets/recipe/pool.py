"""The pool stage: hundreds of small LoRAs of emoji, styles and places, to train and to judge the search for LoRAs by their weights.

A LoRA of the pool need not draw well, only recognisably, so it is short: few rows, few scenes, whose latents are made once. Their files
carry no metadata and no telling names; what each is stands in ``manifest.json`` beside them. Two kinds are held out from whoever learns
from the pool: ``seen``, another drawing (another vendor's, other captions) of concepts that training has, and ``unseen``, concepts that
training has not. No concept shares a word with another, nor with a bundled LoRA's or with what the base knows.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from composition import atomic, backbones
from composition.adapters import Adapters
from composition.backbones.base import Backbone
from composition.backbones.loading import open as opening
from composition.training.concept import Concept, Plan, latents_of, train
from retrieval.judge import Judge

from . import flux, looks, measure
from .art import ART
from .autoencoder import tensor
from .labelled import further_names
from .objects import HELD_OBJECTS, OBJECTS, WORN, article
from .places import HELD_PLACES, PLACES, painted
from .styles import STYLES
from .world import World

RECIPE = "1"  # a new number when the same command makes other LoRAs
MANIFEST = "manifest.json"
PLAN = Plan(
    rank=4, rate=8e-3, steps=100, batch=4, targets=("attention", "feed_forward", "convolution"),
    noise=(0.5, 1.0), warm=10, half=True,
)  # fmt: skip  # more noise than the base trains on: what a thing is shows before its edges do
FLUX_PLAN = replace(PLAN, targets=("attention", "feed_forward", "projection"), noise=(flux.CENTRE + 0.4, 1.0))
TOGETHER = 8  # LoRAs that train as one batch, row beside row
SCENES = 32  # of each LoRA
VARIANTS = 24  # drawings of each place
FIRST = 8 * 10**9  # scene numbers of the first LoRA; the next has them a thousand on
HELD_LOOKS = ("neon", "candy")  # a style and a place whose words the judge knows, held out unseen
FORMS = {"plain": "{what} {place}", "tags": "{bare}, {place}", "long": "a picture of {what} {place}"}  # of captions
INVENTED = 5  # every so many-th LoRA has a trigger that is no word
STAND_IN = next(iter(PLACES))  # the place whose ground and phrase a new place takes


class Sizes(NamedTuple):
    """Concepts that are objects: held out unseen; of the training with two drawings and with one. seen: of these, held-out drawings."""

    unseen: int = 48
    seen: int = 42
    twice: int = 60
    once: int = 300

    @property
    def concepts(self) -> int:
        return self.unseen + self.twice + self.once


SIZES = Sizes()


class Entry(NamedTuple):
    """One LoRA. phrase: what a prompt calls its concept ("a horse", "ink drawing", "on a volcano"). trigger: what its captions call
    it. number: its place in the pool, by which its file is named."""

    number: int
    category: str
    concept: str
    phrase: str
    trigger: str
    vendor: str
    form: str
    split: str

    @property
    def stem(self) -> str:
        return f"p{self.number:03d}"

    @property
    def name(self) -> str:
        """What its maker might have called the file."""
        return f"{self.concept} {self.vendor}"


class Line(NamedTuple):
    """What one scene shows, and its caption."""

    subject: str
    place: str
    caption: str


def concepts(art: str | Path) -> list[str]:
    """Names of emoji that share no word with one another, nor with what the base knows or a bundled LoRA teaches; in an order drawn once."""
    spoken = [*OBJECTS, *HELD_OBJECTS, *WORN, *(words for words, _ in (PLACES | HELD_PLACES | STYLES).values()), *looks.STYLES, *looks.PLACES]
    taken = {_root(word) for phrase in spoken for word in phrase.split()}
    chosen = []
    for name in further_names(art):
        words = {_root(word) for word in name.replace("-", " ").split()}
        if not words & taken:
            taken |= words
            chosen.append(name)
    random.Random(f"pool/{RECIPE}").shuffle(chosen)
    return chosen


def _root(word: str) -> str:
    """Without a plural's ending."""
    return word.removesuffix("s")


def entries(art: str | Path, sizes: Sizes = SIZES) -> list[Entry]:
    """All LoRAs of the pool, in the order in which they are made: whatever part of it is done has every split and category."""
    names, rows, vendors = concepts(art), [], list(ART)
    if len(names) < sizes.concepts:
        raise ValueError(f"the art under {art} names {len(names)} concepts of words of their own; the pool needs {sizes.concepts}")
    unseen, known = names[: sizes.unseen], names[sizes.unseen : sizes.concepts]
    again = [*known[: sizes.seen // 2], *known[len(known) - (sizes.seen - sizes.seen // 2) :]]  # of both those with two drawings and with one
    drawings = {"unseen": [(name, 0) for name in unseen],
                "train": [(name, k) for i, name in enumerate(known) for k in range(2 if i < sizes.twice else 1)],
                "seen": [(name, 2) for name in again]}  # fmt: skip
    for split, drawn in drawings.items():
        rows += [("object", name, article(name), k, split) for name, k in drawn]
    styles = STYLES | looks.STYLES
    places = {name: HELD_PLACES[name] for name in HELD_PLACES} | looks.PLACES
    for category, some in (("style", styles), ("place", places)):
        for number, (name, (words, _)) in enumerate(some.items()):
            if name in HELD_LOOKS:
                rows.append((category, name, words, 0, "unseen"))
                continue
            rows += [(category, name, words, k, "train") for k in range(2)]
            rows += [(category, name, words, 2, "seen")] if number % 2 == 0 else []
    pool = []
    for number, (category, concept, phrase, k, split) in enumerate(_mixed(rows)):
        rng = random.Random(f"pool/{concept}")
        first, form = rng.randrange(len(vendors)), rng.randrange(len(FORMS))
        trigger = _invented(f"{concept}/{k}") if number % INVENTED == 0 else concept if category == "object" else phrase
        pool.append(Entry(number, category, concept, phrase, trigger, vendors[(first + k) % len(vendors)],
                          list(FORMS)[(form + k) % len(FORMS)], split))  # fmt: skip
    return pool


def _mixed(rows: Sequence[tuple[str, str, str, int, str]]) -> list[tuple[str, str, str, int, str]]:
    """In an order drawn once, in which a held-out drawing never comes before its concept's first."""
    rng, keys = random.Random(f"pool/order/{RECIPE}"), []
    first: dict[str, float] = {}
    for _, concept, _, _, split in rows:
        keys.append(max(rng.random(), first.get(concept, 0.0) if split == "seen" else 0.0))
        first.setdefault(concept, keys[-1])
    return [rows[i] for i in sorted(range(len(rows)), key=keys.__getitem__)]


def _invented(seed: str) -> str:
    """A word of two syllables that nobody has read."""
    rng = random.Random(f"word/{seed}")
    return "".join(rng.choice("bdfgklmnprtvz") + rng.choice("aeiou") + rng.choice("bdgklmnrtvxz") for _ in range(2))


def lines(entry: Entry, count: int = SCENES) -> list[Line]:
    """What its scenes show, one object each, and the captions it is trained with."""
    rng, rows = random.Random(f"pool/lines/{entry.concept}/{entry.vendor}"), []
    for _ in range(count):
        subject = entry.concept if entry.category == "object" else rng.choice(list(OBJECTS)[:48])
        place = STAND_IN if entry.category == "place" else rng.choice(list(PLACES))
        spoken = entry.trigger if entry.category == "place" else PLACES[place][0]
        bare = entry.trigger if entry.category == "object" else subject
        caption = FORMS[entry.form].format(what=article(bare), bare=bare, place=spoken)
        rows.append(Line(subject, place, f"{caption}, {entry.trigger}" if entry.category == "style" else caption))
    return rows


def queries(entry: Entry) -> list[str]:
    """Prompts that want it, none of them a caption of a LoRA of the pool."""
    rng = random.Random(f"pool/queries/{entry.concept}/{entry.vendor}")
    first, second = (article(name) for name in rng.sample(list(OBJECTS)[:48], 2))
    place = PLACES[rng.choice(list(PLACES))][0]
    if entry.category == "object":
        return [entry.phrase, f"{entry.phrase} and {first} {place}", f"{second} beside {entry.phrase}", f"{place}, {entry.phrase}"]
    if entry.category == "style":
        return [entry.phrase, f"{first} and {second} {place}, {entry.phrase}", f"{first}, {entry.phrase}"]
    return [entry.phrase, f"{first} and {second} {entry.phrase}", f"{entry.phrase}, {second}"]


def world_of(art: Path, some: Sequence[Entry], size: int) -> World:
    """A world that has the objects of these LoRAs at hand, by all vendors."""
    codes = further_names(art)
    return World(art, objects=48, places=len(PLACES), size=size, vendors=tuple(ART), variants=VARIANTS,
                 more={entry.concept: codes[entry.concept] for entry in some if entry.category == "object"})  # fmt: skip


def pictures(world: World, entry: Entry, count: int = SCENES) -> np.ndarray:
    """(count, size, size, 3) uint8: the scenes that `lines` names."""
    if entry.category == "place":
        paint = (HELD_PLACES | looks.PLACES)[entry.concept][1]
        grounds = np.stack([painted(paint, world.size, f"{entry.concept}/{entry.vendor}/{i}") for i in range(VARIANTS)])
        usual, world.grounds = world.grounds, {STAND_IN: grounds}
    else:
        usual = world.grounds
    try:
        drawn = [world.scene(FIRST + 1000 * entry.number + i, names=[line.subject], place=line.place, vendor=entry.vendor).picture
                 for i, line in enumerate(lines(entry, count))]  # fmt: skip
    finally:
        world.grounds = usual
    if entry.category == "style":
        drawn = [(STYLES | looks.STYLES)[entry.concept][1](picture) for picture in drawn]
    return np.stack(drawn)


def make(pipe, art: Path, some: Sequence[Entry], folder: Path, work: Path, *, plan: Plan = PLAN, together: int = TOGETHER,
         scenes: int = SCENES, part: tuple[int, int] = (1, 1), over: Callable[[], bool] = lambda: False,
         report: Callable[[str], None] = print, base: str = "pocket") -> bool:  # fmt: skip
    """Train each of these that has no file yet, ``together`` at once; True when none is left.

    part: (k, n) leaves all groups but every n-th from the k-th on to other processes, which may work in the same folders.
    over: asked after every step; when it says True training stops, and the next call goes on from the checkpoint in ``work``. The manifest
    lists the files that are there.
    """
    backbone, world = backbones.of(pipe, opening.family(pipe)), world_of(art, some, pipe.vae.config.sample_size)
    groups = [some[first : first + together] for first in range(0, len(some), together)]
    for group in groups[part[0] - 1 :: part[1]]:
        missing = [entry for entry in group if not (folder / f"{entry.stem}.safetensors").is_file()]
        if not missing:
            continue
        begun = time.process_time()
        if over() or not _learn(backbone, world, missing, folder, work, plan, scenes, over):
            report("the budget is spent; the same command with a budget goes on from here")
            return False
        write_manifest(folder, some, scenes, base)
        report(f"{missing[0].stem} to {missing[-1].stem}: {(time.process_time() - begun) / len(missing):.1f} core-seconds a LoRA")
    write_manifest(folder, some, scenes, base)
    return True


def spent(minutes: float) -> Callable[[], bool]:
    """Whether this process has used so many minutes of processor time from now on."""
    end = time.process_time() + 60 * minutes
    return lambda: time.process_time() > end


def _learn(backbone: Backbone, world: World, group: Sequence[Entry], folder: Path, work: Path, plan: Plan, scenes: int,
           stop: Callable[[], bool]) -> bool:  # fmt: skip
    """Train one group, row beside row; False when it was stopped before its end."""
    adapters = Adapters(backbone.components, family=backbone.family, block=backbone.block)
    learned = [Concept(entry.stem, latents_of(backbone, tensor(pictures(world, entry, scenes))), [line.caption for line in lines(entry, scenes)],
                       origin=f"{RECIPE}/{entry.name}/{scenes}") for entry in group]  # fmt: skip
    checkpoint = work / f"pool-{'-'.join(entry.stem for entry in group)}.pt"
    try:
        done = train(backbone, adapters, learned, plan, folder, checkpoint=checkpoint, save_every=max(1, plan.steps // 4), stop=stop)
    finally:
        adapters.close()
    if done:
        checkpoint.unlink(missing_ok=True)
    return bool(done)


def write_manifest(folder: Path, some: Sequence[Entry], scenes: int = SCENES, base: str = "pocket") -> Path:
    """``manifest.json``: of every file that is there what it is, its captions, prompts that want it, and the art it was drawn from."""
    rows = [{"file": f"{entry.stem}.safetensors", "name": entry.name, "category": entry.category, "concept": entry.concept, "phrase": entry.phrase,
             "trigger": entry.trigger, "split": entry.split, "art": entry.vendor, "form": entry.form,
             "captions": list(dict.fromkeys(line.caption for line in lines(entry, scenes))), "queries": queries(entry)}
            for entry in some if (folder / f"{entry.stem}.safetensors").is_file()]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return atomic.write(folder / MANIFEST, json.dumps({"base": base, "recipe": RECIPE, "loras": rows}, indent=1) + "\n")


def figures(pipe, judge: Judge, art: Path, some: Sequence[Entry], folder: Path, count: int, of: int = 6) -> dict[str, dict[str, float | str]]:
    """Percent of pictures in which the concept is the judge's first of all the names it knows, without the LoRA and with it.

    Of the first `of` LoRAs of objects, `count` pictures each, over the base's places, with the words of their captions.
    """
    names, table = [*list(OBJECTS)[:48], *HELD_OBJECTS, *WORN, *further_names(art)], {}
    texts = judge.read([article(name) for name in names])
    for entry in [entry for entry in some if entry.category == "object" and (folder / f"{entry.stem}.safetensors").is_file()][:of]:
        places = [PLACES[name][0] for name in (list(PLACES) * count)[:count]]
        prompts = [FORMS[entry.form].format(what=article(entry.trigger), bare=entry.trigger, place=place) for place in places]
        without = measure.paint(pipe, prompts, seed=3)
        pipe.load_lora_weights(folder / f"{entry.stem}.safetensors")
        with_it = measure.paint(pipe, prompts, seed=3)
        pipe.unload_lora_weights()
        shares = [round(100 * float(((judge.see(drawn) @ texts.T).argmax(1) == names.index(entry.concept)).float().mean()), 1)
                  for drawn in (without, with_it)]  # fmt: skip
        table[entry.stem] = {"concept": entry.concept, "trigger": entry.trigger, "pictures": count, "without": shares[0], "with": shares[1]}
    return table
