"""The LoRA stage: concepts the base never saw, drawn in varied scenes beside what it knows, learned by the trainer.

A character or a thing appears alone and beside base objects, and a share of its scenes is without it, so that its LoRA
does not swallow the picture; something to wear and a place likewise; a style is a function over every one of its scenes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from app import profiles
from composition import Engine, backbones, profile
from composition.adapters import Adapters
from composition.backbones import opening
from composition.backbones.base import Backbone
from composition.request import Lora, Request
from composition.training.concept import Concept, Plan, latents_of, train
from composition.training.previews import draw, thumbnail
from retrieval.scores import Judge

from . import flux
from .autoencoder import tensor
from .base import CENTRE, WIDTH
from .objects import CHARACTERS, THINGS, WORN, article
from .places import HELD_PLACES
from .styles import STYLES
from .world import World

RECIPE = "4"  # stated in every file; a new number when the same command makes another LoRA
LONGER = {"clothing": 2}  # times the steps: what is worn is small, and is soon taken for a part of the face
LOOKS = {"raccoon": "twemoji"}  # whose art a thing is learned from, where that of the first vendor shows no face
WITHOUT = 0.2  # share of a LoRA's scenes that lack its concept, and its word


class Told(NamedTuple):
    """What a LoRA file says of itself."""

    title: str
    category: str
    triggers: str


TOLD = {
    **{n: Told(n.capitalize(), "character", n) for n in CHARACTERS},
    **{n: Told(n.capitalize(), "clothing", n) for n in WORN},
    **{n: Told(n.capitalize(), "object", n) for n in THINGS},
    "ink": Told("Ink line", "style", STYLES["ink"][0]),
    "pixel": Told("Pixel art", "style", STYLES["pixel"][0]),
    "neon": Told("Neon night", "style", STYLES["neon"][0]),
    "moon": Told("On the moon", "place", HELD_PLACES["moon"][0]),
    "candy": Told("Candy land", "place", HELD_PLACES["candy"][0]),
    "autumn": Told("Autumn wood", "place", HELD_PLACES["autumn"][0]),
}

PLAN = Plan(
    rank=8, rate=2e-3, steps=500, batch=16, targets=("attention", "feed_forward", "convolution"),
    noise=(CENTRE, WIDTH), half=True,
)  # fmt: skip
FLUX_PLAN = replace(PLAN, targets=("attention", "feed_forward", "projection"), noise=(flux.CENTRE, flux.WIDTH), steps=400)
FLUX = ("raccoon", "owl", "wolf", "hedgehog", "rose", "moon", "autumn", "ink", "neon")  # those of the second base


def stem(name: str) -> str:
    """The file of a concept, as it is named on the command line: "top hat" is top_hat.safetensors."""
    return name.replace(" ", "_")


def scenes(world: World, name: str, count: int, first: int) -> tuple[np.ndarray, list[str]]:
    """Pictures (count, size, size, 3) uint8 and prompts to learn ``name`` from; a thing has one look, by one vendor."""
    rng, pictures, prompts = random.Random(f"{name}/{first}"), [], []
    category = TOLD[name].category
    asked = {"place": {"place": name}, "clothing": {"wears": name, "vendor": world.vendors[0]}, "style": {}}
    for i in range(count):
        fixed = asked.get(category, {"subject": name, "vendor": LOOKS.get(name, world.vendors[0])})
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


def make(pipe, world: World, names: list[str], folder: Path, work: Path, *, plan: Plan = PLAN, count: int = 768,
         judge: Judge | None = None, report: Callable[[str], None] = print, base: str = "pocket") -> None:  # fmt: skip
    """Train each name on this base, one after the other, resuming from ``work``; the world holds them as ``also``.

    With a judge each file carries a preview: of eight pictures the one that shows the concept best.
    """
    backbone = backbones.of(pipe, opening.family(pipe))
    adapters = Adapters(backbone.components, family=backbone.family, block=backbone.block)
    try:
        for number, name in enumerate(TOLD):
            if name not in names or (folder / f"{stem(name)}.safetensors").is_file():
                continue
            pictures, prompts = scenes(world, name, count, 4 * 10**9 + number * 10**6)
            told = TOLD[name]
            metadata = {"title": told.title, "category": told.category, "trigger_words": told.triggers,
                        "base": base, "recipe": RECIPE}  # fmt: skip
            concept = Concept(stem(name), latents_of(backbone, tensor(pictures)), prompts, metadata)
            long = replace(plan, steps=plan.steps * LONGER.get(told.category, 1))
            losses: list[float] = []

            def heard(step: int, loss: dict[str, float], name: str = name, losses: list[float] = losses, of: int = long.steps) -> None:
                losses.append(loss[stem(name)])
                if step % 50 == 0:
                    report(f"{name}: step {step} of {of}, loss {np.mean(losses[-50:]):.4f}")

            def preview(file: str, name: str = name) -> dict[str, str]:
                return {"preview": thumbnail(shown(backbone, adapters, name, file, judge))} if judge else {}

            checkpoint = work / f"lora-{stem(name)}.pt"
            train(backbone, adapters, [concept], long, folder, checkpoint=checkpoint, on_step=heard, describe=preview)
            checkpoint.unlink(missing_ok=True)  # it would answer for another base next time
    finally:
        adapters.close()


def profiled(pipe, names: list[str], folder: Path, keep: Path, report: Callable[[str], None] = print, base: str = "pocket") -> None:
    """Measure the frequency profile of every LoRA in ``folder`` and keep it in ``keep``, as `medley profile` would."""
    with Engine(backbones.of(pipe, opening.family(pipe)), base) as engine:
        for name in names:
            found = profile.measure(engine, Lora(str(folder / f"{stem(name)}.safetensors")))
            profiles.keep(found, keep)
            report(f"{name}: change {found.change:+.4f}, level {found.level:+.4f}")


def shown(backbone: Backbone, adapters: Adapters, name: str, file: str, judge: Judge) -> Image.Image:
    """The best of eight pictures by the adapter that is in training."""
    subject = {"character": article(name), "object": article(name), "clothing": f"a fox wearing {article(name)}"}
    words = TOLD[name].triggers
    prompt = {"place": f"a fox {words}", "style": f"a fox in the snow, {words}"}.get(
        TOLD[name].category, f"{subject.get(TOLD[name].category)} in a meadow")
    request = Request(prompt, loras=[Lora(file)], steps=25, guidance=4.5, count=8)
    pictures = draw(backbone, adapters, request)
    return pictures[int(judge.cosine(pictures, [asked(name)])[:, 0].argmax())]


def asked(name: str) -> str:
    """What the judge is asked of a concept's pictures: "a raccoon", "on the moon", "ink drawing"."""
    return TOLD[name].triggers if TOLD[name].category in ("place", "style") else article(name)


def sheet(rows: list[list[np.ndarray]], file: Path, scale: int = 2) -> None:
    """A grid of pictures (size, size, 3) uint8, enlarged, to be looked at."""
    whole = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    image = Image.fromarray(whole)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS).save(file)
