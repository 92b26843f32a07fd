"""The conditions of the second base: LoRAs that read edges, flat colours, or a subject (EasyControl, arXiv 2503.07027).

Pairs come from the world. A scene is drawn larger than the pictures, cut to one of several sizes, and annotated at that size, as a user's
picture is. A subject stands alone on plain ground as its scene's vendor draws it. Subjects are the world's objects and everything else the
art has but what is held out, so that one never trained on can be read as well; half the captions do not name them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from composition import annotators, backbones
from composition import conditions as placed
from composition.backbones import vae
from composition.backbones.loading import open as opening
from composition.loras import condition as files
from composition.loras.condition import Settings
from composition.training.condition import train
from composition.training.defaults import halves
from composition.training.pairs import Bucket, ConditionPlan, Pairs

from .drawing import each
from .flux import SHORT
from .labelled import further_names
from .loras import RECIPE
from .objects import HELD_OBJECTS, article
from .world import World

FIRST = 8 * 10**9  # scene numbers of the training
SHAPES = ((8, 8, 10), (10, 8, 2), (8, 10, 2), (8, 6, 2), (6, 8, 2), (10, 10, 2))  # width and height in eighths of a side; parts of all pairs
NEW_SHAPES = ((12, 8), (8, 12), (10, 6), (12, 12))  # never trained on
LARGER = 10 / 8  # side of a scene over the side of the pictures
OFFSET = 16  # rows of tokens that a subject stands below the picture's first: as many as a picture of twice the side has
WHITE = (255, 255, 255)
COLOURED = 0.3  # of subjects stand on another colour than white
FILLED = (0.75, 1.0)  # share of the side that a subject takes up
UNNAMED = 0.5  # of captions call a subject THING
THING = "a thing"


class Stage(NamedTuple):
    """A part of a training; the next goes on from what it learned. size: side of the condition pictures over the side of the base's.

    bias: as in Settings; at 0 the base is disturbed at first, and the quickest thing to learn is to look away. pairs: drawn for it.
    """

    size: float
    bias: float
    plan: ConditionPlan
    pairs: int


class Card(NamedTuple):
    """What a condition LoRA's file says, and how it is trained."""

    title: str
    kind: str
    annotator: str
    pad: str
    stages: tuple[Stage, ...]


NOISY = ConditionPlan(rank=32, rate=5e-3, steps=800, batch=2, views=4, noise=(1.5, 1.2), empty=0.2, drop=0.0, warm=20)  # settles where things stand
CLEARER = replace(NOISY, rate=4e-3, steps=600, batch=4, noise=(0.7, 1.2))  # and then what they look like
FIRMER = replace(CLEARER, rate=3e-3, steps=3000)  # and keeps to it
COARSE = Stage(0.75, -1.5, NOISY, 1600)
CARDS = {
    "canny": Card("Edges", "spatial", "canny", "black", (COARSE, Stage(1.0, -1.5, replace(NOISY, steps=1000), 2400), Stage(1.0, -0.7, CLEARER, 3000))),
    "layout": Card("Flat colours", "spatial", "layout", "black", (COARSE._replace(plan=replace(NOISY, steps=450)),
                                                                  Stage(0.75, -0.7, replace(CLEARER, steps=200), 1600),
                                                                  Stage(1.0, 0.0, FIRMER, 6000))),  # fmt: skip
    "subject": Card("A subject on plain ground", "subject", "", "white", (COARSE, Stage(0.75, -0.7, CLEARER, 3000))),
}


class Pair(NamedTuple):
    """A picture and its condition, (h, w, 3) uint8 each, and a caption."""

    picture: np.ndarray
    condition: np.ndarray
    caption: str


def settings(name: str, stage: Stage, side: int, unit: int) -> Settings:
    """side: of the base's pictures in pixels; unit: pixels of a token."""
    card = CARDS[name]
    return Settings(kind=card.kind, size=round(side * stage.size / unit) * unit, base="pocket-flux", pad=card.pad, annotator=card.annotator,
                    offset=OFFSET, bias=stage.bias)  # fmt: skip


def world_of(art: Path, size: int, objects: int, places: int, vendors: Sequence[str], variants: int, workers: int = 0) -> World:
    """The world at the size that scenes are cut from: the base's objects, every further name of the art, and at hand what is held out."""
    from .places import PLACES
    from .places import variants as drawn

    side = round(size * LARGER)
    grounds = drawn(list(PLACES)[:places], side, variants, workers=workers)
    return World(art, objects=objects, places=places, size=side, vendors=vendors, variants=variants, more=further_names(art), also=tuple(HELD_OBJECTS),
                 grounds=grounds)  # fmt: skip


def cut(picture: np.ndarray, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """The largest part of this shape, somewhere in the picture, at this (width, height)."""
    high, wide = picture.shape[:2]
    scale = min(wide / size[0], high / size[1])
    left, top = (rng.uniform(0, whole - scale * part) for whole, part in ((wide, size[0]), (high, size[1])))
    box = (left, top, left + scale * size[0], top + scale * size[1])
    return Image.fromarray(picture).resize(size, Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC, box)


def portrait(world: World, name: str, vendor: str, side: int, rng: random.Random) -> Image.Image:
    """A subject alone on plain ground, (side, side), mirrored or not."""
    art = world.art[name, vendor]
    scale = side * rng.uniform(*FILLED) / max(art.size)
    wide, high = (max(1, round(length * scale)) for length in art.size)
    colour = tuple(rng.randrange(256) for _ in range(3)) if rng.random() < COLOURED else WHITE
    ground = Image.new("RGBA", (side, side), (*colour, 255))
    piece = art.resize((wide, high), Image.Resampling.LANCZOS)
    ground.alpha_composite(ImageOps.mirror(piece) if rng.random() < 0.5 else piece, ((side - wide) // 2, (side - high) // 2))
    return ground.convert("RGB")


def pair(world: World, own: Sequence[str], name: str, number: int, size: tuple[int, int], side: int) -> Pair:
    """Pair `number` of a condition, of pictures of this (width, height). own: the base's objects. side: of a subject's picture."""
    rng = random.Random(f"{name}/{number}")
    known = rng.random() < 0.5
    if name != "subject":
        names = rng.sample(own, rng.choices((1, 2, 3), (0.52, 0.42, 0.06))[0])
        scene = world.scene(number, names=names)
        picture = cut(scene.picture, size, rng)
        return Pair(np.asarray(picture), np.asarray(annotators.annotate(CARDS[name].annotator, picture)), scene.caption)
    subject, vendor = rng.choice(own if known else world.objects), rng.choice(world.vendors)
    names = [subject] if rng.random() < 0.7 else rng.sample([subject, rng.choice([n for n in own if n != subject])], 2)
    scene = world.scene(number, names=names, vendor=vendor)
    caption = scene.caption.replace(article(subject), THING) if not known or rng.random() < UNNAMED else scene.caption
    return Pair(np.asarray(cut(scene.picture, size, rng)), np.asarray(portrait(world, subject, vendor, side, rng)), caption)


def pixels(shape: tuple[int, int], side: int, unit: int) -> tuple[int, int]:
    """A shape in eighths of the base's side, in pixels: whole tokens."""
    wide, high = (max(unit, round(length * side / 8 / unit) * unit) for length in shape)
    return wide, high


def sizes(count: int, side: int, unit: int) -> list[tuple[tuple[int, int], int]]:
    """(width, height) of each bucket, and how many of `count` pairs it has."""
    parts = sum(part for *_, part in SHAPES)
    counts = {pixels((wide, high), side, unit): round(count * part / parts) for wide, high, part in SHAPES}
    return [(size, number) for size, number in counts.items() if number]


@torch.no_grad()
def pairs(backbone: Any, world: World, own: Sequence[str], name: str, stage: Stage, workers: int = 0) -> Pairs:
    """Pairs of one condition, drawn and encoded."""
    count = stage.pairs
    side, unit = backbone.pipeline.vae.config.sample_size, backbone.pixels_per_token
    stated, buckets, first = settings(name, stage, side, unit), [], FIRST + 10**7 * list(CARDS).index(name)
    half = halves(backbone.device, backbone.dtype)
    for size, number in sizes(count, side, unit):
        parts = [range(first + i, first + min(i + 50, number)) for i in range(0, number, 50)]
        drawn = [p for part in each(lambda some, size=size: [pair(world, own, name, n, size, stated.size) for n in some], parts, workers) for p in part]
        first += number
        shown = torch.from_numpy(np.stack([p.picture for p in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
        seen = torch.cat([placed.pixels(Image.fromarray(p.condition), stated, unit) for p in drawn])
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=half):
            latents, read = (vae.encode(backbone.pipeline, some, part=16).float().cpu() for some in (shown, seen))
        buckets.append(Bucket(latents, read, [p.caption for p in drawn]))
    blank = Image.new("RGB", (stated.size, stated.size), stated.colour)
    card = CARDS[name]
    words = {"title": card.title, "recipe": RECIPE}
    return Pairs(name, stated, buckets, vae.encode(backbone.pipeline, placed.pixels(blank, stated, unit))[0].float().cpu(), words, f"{count} {side}")


@contextmanager
def shorter(pipe: Any) -> Iterator[None]:
    """Prompts are padded to as few tokens as the base was mostly trained on."""
    before = pipe.tokenizer_2.model_max_length
    try:
        pipe.tokenizer_2.model_max_length = min(before, SHORT)
        yield
    finally:
        pipe.tokenizer_2.model_max_length = before


def make(pipe: Any, world: World, own: Sequence[str], names: Sequence[str], folder: Path, work: Path, *, steps: int = 0, count: int = 0,
         workers: int = 0, report: Callable[[str], None] = print) -> None:  # fmt: skip
    """Train each condition LoRA that has no file yet, stage by stage, resuming from ``work``. own: the base's objects.

    steps, count: of every stage in place of its own, and of its pairs; 0 leaves them.
    """
    backbone = backbones.of(pipe, opening.family(pipe))
    half = halves(backbone.device, backbone.dtype)
    for name in names:
        before, stages = None, CARDS[name].stages
        for number, stage in enumerate(stages, 1):
            file = (folder if number == len(stages) else work / f"conditions-{number}") / f"{name}.safetensors"
            stage = stage._replace(plan=replace(stage.plan, half=half, steps=steps or stage.plan.steps), pairs=count or stage.pairs)
            if not file.is_file():
                checkpoint = work / f"condition-{name}-{number}.pt"
                learned = pairs(backbone, world, own, name, stage, workers)
                begin = files.read(before, backbone.denoiser).adapters[0] if before is not None else None
                with shorter(pipe):
                    train(backbone, learned, stage.plan, file.parent, checkpoint=checkpoint, save_every=50, begin=begin,
                          on_step=_reporting(f"{name}, stage {number} of {len(stages)}", stage.plan.steps, report))  # fmt: skip
                checkpoint.unlink(missing_ok=True)  # else the next base would resume from it
            before = file


def _reporting(label: str, steps: int, report: Callable[[str], None]) -> Callable[[int, Mapping[str, float], object], None]:
    """What reports the mean loss of every fifty steps."""
    losses: list[Mapping[str, float]] = []

    def on_step(step: int, loss: Mapping[str, float], _: object) -> None:
        losses.append(loss)
        if step % 50 == 0 or step == steps:
            report(f"{label}: step {step} of {steps}, loss {np.mean([value for part in losses for value in part.values()]):.4f}")
            losses.clear()

    return on_step
