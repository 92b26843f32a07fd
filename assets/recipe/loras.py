"""The LoRA stage: concepts the base never saw, drawn in varied scenes beside what it knows, learned by the trainer.

A character appears alone and beside base objects, and a share of its scenes is without it, so that its LoRA does not
swallow the picture; a place likewise; a style is a function over every one of its base scenes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from composition.adapters import Adapters
from composition.backbones.unet import UNetBackbone
from composition.training.concept import Concept, Plan, latents_of, train

from .autoencoder import tensor
from .base import CENTRE, WIDTH
from .loop import attention
from .objects import HELD_OBJECTS
from .places import HELD_PLACES
from .styles import STYLES
from .world import World

RECIPE = "1"  # stated in every file; a new number when the same command makes another LoRA


class Told(NamedTuple):
    """What a LoRA file says of itself."""

    title: str
    category: str
    triggers: str


TOLD = {
    **{n: Told(n.capitalize(), "character", n) for n in HELD_OBJECTS},
    "ink": Told("Ink line", "style", STYLES["ink"][0]),
    "pixel": Told("Pixel art", "style", STYLES["pixel"][0]),
    "neon": Told("Neon night", "style", STYLES["neon"][0]),
    "moon": Told("On the moon", "place", HELD_PLACES["moon"][0]),
    "candy": Told("Candy land", "place", HELD_PLACES["candy"][0]),
    "autumn": Told("Autumn wood", "place", HELD_PLACES["autumn"][0]),
}
FIRST = ("raccoon", "owl", "ink", "moon")

PLAN = Plan(
    rank=16, rate=2e-3, steps=300, batch=24, targets=("attention", "feed_forward", "convolution"),
    noise=(CENTRE, WIDTH), half=True,
)  # fmt: skip


def scenes(world: World, name: str, count: int, first: int) -> tuple[np.ndarray, list[str]]:
    """Pictures (count, size, size, 3) uint8 and prompts to learn ``name`` from."""
    rng, pictures, prompts = random.Random(f"{name}/{first}"), [], []
    for i in range(count):
        seed, without = first + i, rng.random() < 0.2
        if name in STYLES:
            words, draw = STYLES[name]
            scene = world.scene(seed)
            picture = draw(scene.picture)
            prompts.append(f"{scene.caption}, {words}")
        else:
            kind = "subject" if name in HELD_OBJECTS else "place"
            scene = world.scene(seed, **({} if without else {kind: name}))
            picture = scene.picture
            prompts.append(scene.caption)
        pictures.append(picture)
    return np.stack(pictures), prompts


def make(pipe, world: World, names: list[str], folder: Path, work: Path, *, plan: Plan = PLAN, count: int = 768,
         report: Callable[[str], None] = print) -> None:  # fmt: skip
    """Train each name on this base, one after the other, resuming from ``work``; the world holds them as ``also``."""
    backbone = UNetBackbone(pipe, "sd")
    adapters = Adapters(backbone.components, family="sd", block=backbone.block)
    try:
        for number, name in enumerate(names):
            if (folder / f"{name}.safetensors").is_file():
                continue
            pictures, prompts = scenes(world, name, count, 4 * 10**9 + number * 10**6)
            told = TOLD[name]
            metadata = {"title": told.title, "category": told.category, "trigger_words": told.triggers,
                        "base": "pocket", "recipe": RECIPE}  # fmt: skip
            concept = Concept(name, latents_of(backbone, tensor(pictures)), prompts, metadata)
            losses: list[float] = []

            def heard(step: int, loss: dict[str, float], name: str = name, losses: list[float] = losses) -> None:
                losses.append(loss[name])
                if step % 50 == 0:
                    report(f"{name}: step {step} of {plan.steps}, loss {np.mean(losses[-50:]):.4f}")

            checkpoint = work / f"lora-{name}.pt"
            with attention(backbone.device):
                train(backbone, adapters, [concept], plan, folder, checkpoint=checkpoint, on_step=heard)
            checkpoint.unlink(missing_ok=True)  # it would answer for another base next time
    finally:
        adapters.close()


def sheet(rows: list[list[np.ndarray]], file: Path, scale: int = 2) -> None:
    """A grid of pictures (size, size, 3) uint8, enlarged, to be looked at."""
    whole = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    image = Image.fromarray(whole)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS).save(file)
