"""The LoRA stage: concepts the base never saw, drawn in varied scenes beside what it knows, learned by the trainer.

A character or a thing appears alone and beside base objects, and a share of its scenes is without it, so that its LoRA
does not swallow the picture; something to wear and a place likewise; a style is a function over every one of its scenes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from composition import Engine, Lora, backbones
from composition.adapters import Adapters
from composition.backbones.base import Backbone
from composition.backbones.loading import open as opening
from composition.profiles.store import ProfileStore
from composition.profiling import frequency as frequency_profile
from composition.training.concept import Concept, Plan, latents_of, train

from . import flux
from .autoencoder import tensor
from .base import CENTRE, WIDTH
from .drawing import each
from .objects import CHARACTERS, THINGS, WORN, article
from .places import HELD_PLACES
from .styles import STYLES
from .world import World

RECIPE = "4"  # stated in every file; a new number when the same command makes another LoRA
LONGER = {"clothing": 2}  # times the steps: what is worn is small, and is soon taken for a part of the face
SHORT = 6  # rank that all but characters are shortened to: about 1 % of their updates' energy less, in three quarters of the bytes
LOOKS = {"raccoon": "twemoji"}  # whose art a thing is learned from, where that of the first vendor shows no face
FIRST = 4 * 10**9  # scene numbers of the first name; the next has them a million on
TRIAL = 16  # steps by which the time of one is measured
MARGIN = 0.93  # share of the time left that steps are planned for
WITHOUT = 0.2  # share of a LoRA's scenes that lack its concept, and its word


class Card(NamedTuple):
    """What a LoRA's file header says of it."""

    title: str
    category: str
    triggers: str


CARDS = {
    **{n: Card(n.capitalize(), "character", n) for n in CHARACTERS},
    **{n: Card(n.capitalize(), "clothing", n) for n in WORN},
    **{n: Card(n.capitalize(), "object", n) for n in THINGS},
    "ink": Card("Ink line", "style", STYLES["ink"][0]),
    "pixel": Card("Pixel art", "style", STYLES["pixel"][0]),
    "neon": Card("Neon night", "style", STYLES["neon"][0]),
    "moon": Card("On the moon", "place", HELD_PLACES["moon"][0]),
    "candy": Card("Candy land", "place", HELD_PLACES["candy"][0]),
    "autumn": Card("Autumn wood", "place", HELD_PLACES["autumn"][0]),
}

PLAN = Plan(
    rank=8, rate=2e-3, steps=1000, batch=16, targets=("attention", "feed_forward", "convolution"),
    noise=(CENTRE, WIDTH), half=True,
)  # fmt: skip
FLUX_PLAN = replace(PLAN, targets=("attention", "feed_forward", "projection"), noise=(flux.CENTRE, flux.WIDTH), steps=800)
FLUX = ("raccoon", "owl", "wolf", "hedgehog", "rose", "moon", "autumn", "ink", "neon")  # those of the second base


def stem(name: str) -> str:
    """The file of a concept, as it is named on the command line: "top hat" is top_hat.safetensors."""
    return name.replace(" ", "_")


def scenes(world: World, name: str, count: int, first: int) -> tuple[np.ndarray, list[str]]:
    """Pictures (count, size, size, 3) uint8 and prompts to learn ``name`` from; a thing has one look, by one vendor."""
    rng, pictures, prompts = random.Random(f"{name}/{first}"), [], []
    category = CARDS[name].category
    fixed_by_category = {"place": {"place": name}, "clothing": {"wears": name, "vendor": world.vendors[0]}, "style": {}}
    for i in range(count):
        fixed = fixed_by_category.get(category, {"subject": name, "vendor": LOOKS.get(name, world.vendors[0])})
        if category != "style" and rng.random() < WITHOUT:
            fixed = {}
        scene = world.scene(first + i, **fixed)
        picture, prompt = scene.picture, scene.caption
        if category == "style":
            words, draw = STYLES[name]
            picture, prompt = draw(picture), f"{prompt}, {words}"
        pictures.append(picture)
        prompts.append(prompt)
    return np.stack(pictures), prompts


def drawn(world: World, names: Sequence[str], count: int = 768, workers: int = 0) -> dict[str, tuple[np.ndarray, list[str]]]:
    """The scenes of each name, drawn in ``workers`` processes besides this one; the world holds the names as ``also``."""
    return dict(zip(names, each(lambda name: scenes(world, name, count, FIRST + 10**6 * list(CARDS).index(name)), names, workers), strict=True))


class Group(NamedTuple):
    """Names that train together, row beside row, and for how long."""

    names: tuple[str, ...]
    plan: Plan


def groups(names: Sequence[str], plan: Plan, together: int) -> list[Group]:
    """The names split by their number of steps, at most ``together`` in a group."""
    apart: dict[int, list[str]] = {}
    for name in names:
        apart.setdefault(plan.steps * LONGER.get(CARDS[name].category, 1), []).append(name)
    return [Group(tuple(some[i : i + together]), replace(plan, steps=steps))
            for steps, some in apart.items() for i in range(0, len(some), together)]  # fmt: skip


def make(pipe, world: World, names: Sequence[str], folder: Path, work: Path, *, plan: Plan = PLAN, together: int = 1, count: int = 768,
         workers: int = 0, report: Callable[[str], None] = print, base: str = "pocket") -> None:  # fmt: skip
    """Train each name that has no file yet on this base, ``together`` at once, resuming from ``work``; the world holds them as ``also``."""
    missing = [name for name in CARDS if name in names and not (folder / f"{stem(name)}.safetensors").is_file()]
    for group in groups(missing, plan, together):
        learn(pipe, group, drawn(world, group.names, count, workers), folder, work, report=report, base=base)


def learn(pipe, group: Group, scenes: Mapping[str, tuple[np.ndarray, list[str]]], folder: Path, work: Path, *,
          minutes: Callable[[], float] | None = None, trial: int = TRIAL, report: Callable[[str], None] = print,
          base: str = "pocket") -> None:  # fmt: skip
    """Train one group on this base.

    minutes: returns, once training can begin, how much time there is; the plan is then cut to the steps that fit in it, as measured in
    a trial of `trial` steps.
    """
    backbone = backbones.of(pipe, opening.family(pipe))
    adapters = Adapters(backbone.components, family=backbone.family, block=backbone.block)
    concepts = [Concept(stem(name), latents_of(backbone, tensor(scenes[name][0])), scenes[name][1], _metadata(name, base))
                for name in group.names]  # fmt: skip
    plan, label = group.plan, ", ".join(group.names)
    losses: list[Mapping[str, float]] = []

    def on_step(step: int, loss: Mapping[str, float]) -> None:
        losses.append(loss)
        if step % 50 == 0:
            report(f"{label}: step {step} of {plan.steps}, loss {np.mean([value for step_losses in losses for value in step_losses.values()]):.4f}")
            losses.clear()

    try:
        if minutes is not None:
            _pace(backbone, adapters, concepts, plan, folder, trial)  # whatever fails or compiles does so before its time begins
            until = time.monotonic() + 60 * minutes()
            pace = _pace(backbone, adapters, concepts, plan, folder, trial)
            plan = replace(plan, steps=max(1, min(plan.steps, int(MARGIN * (until - time.monotonic()) / pace))))
            report(f"{label}: {1000 * pace:.0f} ms a step, {plan.steps} steps")
        checkpoint = work / f"lora-{'-'.join(map(stem, group.names))[:100]}.pt" if minutes is None else None
        train(backbone, adapters, concepts, plan, folder, checkpoint=checkpoint, on_step=on_step)
        if checkpoint:
            checkpoint.unlink(missing_ok=True)  # else the next base would resume from it
    finally:
        adapters.close()


def _metadata(name: str, base: str) -> dict[str, str]:
    card = CARDS[name]
    return {"title": card.title, "category": card.category, "trigger_words": card.triggers, "base": base, "recipe": RECIPE}


def _pace(backbone: Backbone, adapters: Adapters, concepts: Sequence[Concept], plan: Plan, folder: Path, trial: int) -> float:
    """Seconds of a step, by a training that is stopped after a few and writes nothing."""
    times: list[float] = []

    def on_step(step: int, loss: Mapping[str, float]) -> None:
        if step in (trial // 2, trial):
            sum(loss.values())  # waits for the device
            times.append(time.monotonic())

    train(backbone, adapters, concepts, replace(plan, steps=2 * trial), folder, on_step=on_step, stop=lambda: len(times) == 2)
    return (times[1] - times[0]) / (trial - trial // 2)


def profiled(pipe, names: Sequence[str], folder: Path, keep: Path, report: Callable[[str], None] = print, base: str = "pocket") -> None:
    """Measure the frequency profile of every LoRA in ``folder`` and keep it in ``keep``, as `medley profile` would."""
    with Engine(backbones.of(pipe, opening.family(pipe)), base) as engine:
        for name in names:
            profile = frequency_profile.measure(engine, Lora(str(folder / f"{stem(name)}.safetensors")))
            ProfileStore(keep).keep(profile)
            report(f"{name}: change {profile.change:+.4f}, level {profile.level:+.4f}")


def judge_phrase(name: str) -> str:
    """The phrase the judge looks for in a concept's pictures: "a raccoon", "on the moon", "ink drawing"."""
    return CARDS[name].triggers if CARDS[name].category in ("place", "style") else article(name)


def sheet(rows: list[list[np.ndarray]], file: Path, scale: int = 2) -> None:
    """A grid of pictures (size, size, 3) uint8, enlarged, to be looked at."""
    whole = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    image = Image.fromarray(whole)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS).save(file)
