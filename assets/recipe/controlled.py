"""The figures of the condition LoRAs: how well pictures keep to their conditions, with bootstrap intervals, beside the base without them.

Edges: the F1 score of a picture's edges (the annotator's own) against the condition's, pixel for pixel and, second, within SLACK. Layout: every
pixel of the picture goes to the nearest of the condition's colours; the mean over these of intersection over union. Subjects: the share
of pictures in which the judge sees a subject that was never trained on. All are made by the Engine, as a user's are.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from composition import Condition, Engine, Refused, Request, annotators, backbones
from composition.backbones.loading import open as opening
from retrieval.judge import Judge

from .conditions import NEW_SHAPES, cut, pixels, portrait
from .objects import HELD_OBJECTS, article
from .places import PLACES
from .world import World

TEST = 9 * 10**9  # scene numbers never trained on
EACH, ELSEWHERE = 100, 40  # pictures of a figure, and of one at sizes never trained on
STEPS, GUIDANCE = 16, 4.5
SLACK = 1 / 64  # of the shorter side, in the second of the two F1 scores
SMALLEST = 0.02  # share of a picture below which a colour is no region of its own


class Case(NamedTuple):
    """What a picture is made from and held against. condition: (picture, annotator) by the name of its LoRA."""

    prompt: str
    size: tuple[int, int]
    conditions: dict[str, Image.Image]
    subject: str = ""


def f1(seen: Image.Image, wanted: Image.Image, slack: int = 0) -> float:
    """Of two pictures of edges, those of the one that lie within `slack` pixels of the other's, and the other way round."""
    from scipy.ndimage import binary_dilation

    edges = [np.asarray(picture.convert("L")) > 127 for picture in (seen, wanted)]
    wide = [binary_dilation(lines, np.ones((2 * slack + 1,) * 2)) if slack else lines for lines in edges]
    precise, recalled = (float((edges[k] & wide[1 - k]).sum()) / max(1, int(edges[k].sum())) for k in (0, 1))
    return 2 * precise * recalled / max(1e-9, precise + recalled)


def miou(seen: Image.Image, wanted: Image.Image) -> float:
    """Mean intersection over union of the condition's regions and the picture's, both by the nearest of the condition's colours."""
    flat = np.asarray(wanted.convert("RGB")).reshape(-1, 3).astype(np.float32)
    colours, own, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    drawn = np.asarray(seen.convert("RGB")).reshape(-1, 3).astype(np.float32)
    nearest = ((drawn[:, None] - colours) ** 2).sum(-1).argmin(1)
    own = own.reshape(-1)
    shares = [((nearest == k) & (own == k)).sum() / ((nearest == k) | (own == k)).sum() for k in range(len(colours))
              if counts[k] >= SMALLEST * len(flat)]  # fmt: skip
    return float(np.mean(shares))


def interval(values: Sequence[float], draws: int = 2000) -> list[float]:
    """Mean, and the bounds of its 95 % bootstrap interval over pictures."""
    rng, held = np.random.default_rng(0), np.asarray(values, float)
    means = held[rng.integers(len(held), size=(draws, len(held)))].mean(1)
    return [round(float(number), 3) for number in (held.mean(), *np.quantile(means, (0.025, 0.975)))]


class Maker:
    """Draws pictures of cases with the condition LoRAs of a folder."""

    def __init__(self, engine: Engine, files: Path) -> None:
        self.engine, self.files = engine, files
        self.seed = 0

    def __call__(self, case: Case, use: Sequence[str]) -> Image.Image:
        """use: names of the conditions that are on. The seed follows from how many were drawn with other settings before: use `again`."""
        with tempfile.TemporaryDirectory() as held:
            controls = []
            for name in use:
                path = Path(held) / f"{name}.png"
                case.conditions[name].save(path)
                controls.append(Condition(str(self.files / f"{name}.safetensors"), str(path), annotator=""))
            request = Request(case.prompt, conditions=controls, size=case.size, steps=STEPS, guidance=GUIDANCE, seed=self.seed)
            return self.engine.run(request).images[0]

    def compared(self, case: Case, *uses: Sequence[str]) -> list[Image.Image]:
        """The case's picture with each of these sets of conditions, all from one seed."""
        pictures = [self(case, use) for use in uses]
        self.seed += 1
        return pictures


def scene_case(world: World, own: Sequence[str], number: int, size: tuple[int, int], names: Sequence[str]) -> Case:
    """A scene that was never trained on, with its edges or flat colours."""
    rng = random.Random(f"case/{number}")
    while True:  # hardly ever twice: until there are edges
        scene = world.scene(TEST + number, names=rng.sample(own, rng.choice((1, 2))))
        seen = cut(scene.picture, size, rng)
        try:
            return Case(scene.caption, size, {name: annotators.annotate(name, seen) for name in names})
        except Refused:
            number += 10**6


def subject_case(world: World, number: int, size: tuple[int, int], side: int) -> Case:
    """A subject never trained on, by itself, and a prompt that puts it somewhere."""
    rng = random.Random(f"subject case/{number}")
    name, place = list(HELD_OBJECTS)[number % len(HELD_OBJECTS)], rng.choice(world.places)
    picture = portrait(world, name, world.vendors[0], side, rng)
    return Case(f"{article(name)} {PLACES[place][0]}", size, {"subject": picture}, name)


def both_case(world: World, number: int, size: tuple[int, int], side: int) -> Case:
    """A subject never trained on and the edges of a scene in which it stands."""
    rng = random.Random(f"both case/{number}")
    name = list(HELD_OBJECTS)[number % len(HELD_OBJECTS)]
    scene = world.scene(TEST + 10**7 + number, names=[name], vendor=world.vendors[0])
    seen = cut(scene.picture, size, rng)
    return Case(scene.caption, size, {"canny": annotators.annotate("canny", seen), "subject": portrait(world, name, world.vendors[0], side, rng)}, name)


def figures(pipe: Any, judge: Judge, world: World, own: Sequence[str], files: Path, names: Sequence[str], share: Callable[[int], int],
            sheets: Path | None = None) -> dict[str, Any]:  # fmt: skip
    """Figures of every condition LoRA there is, and of two at once. world: with what is held out. sheets: a folder for pictures to look at."""
    side = pipe.vae.config.sample_size
    own_size, table = (side, side), {}
    there = [name for name in names if (files / f"{name}.safetensors").is_file()]
    backbone = backbones.of(pipe, opening.family(pipe))
    new = [pixels(shape, side, backbone.pixels_per_token) for shape in NEW_SHAPES]
    with Engine(backbone, "pocket-flux") as engine:
        maker = Maker(engine, files)
        for name in there:
            for label, sizes, count in (("own size", [own_size], share(EACH)), ("new sizes", new, share(ELSEWHERE))):
                if name == "subject":
                    cases = [subject_case(world, n, sizes[n % len(sizes)], side) for n in range(count)]
                else:
                    cases = [scene_case(world, own, n, sizes[n % len(sizes)], [name]) for n in range(count)]
                drawn = [maker.compared(case, [], [name]) for case in cases]
                table[f"{name}, {label}"] = {"pictures": count} | _scores(name, judge, cases, drawn)
                _sheet(sheets, f"{name}-{label}", cases, drawn)
        if {"canny", "layout"} <= set(there):  # trained alone: what each adds where the other is on
            cases = [scene_case(world, own, 10**5 + n, own_size, ["canny", "layout"]) for n in range(share(EACH))]
            drawn = [maker.compared(case, [], ["canny"], ["layout"], ["canny", "layout"]) for case in cases]
            table["canny beside layout"] = {"pictures": len(cases)} | _scores("canny", judge, cases, [row[2:] for row in drawn])
            table["layout beside canny"] = {"pictures": len(cases)} | _scores("layout", judge, cases, [row[1::2] for row in drawn])
            _sheet(sheets, "edges and colours", cases, drawn)
        if {"canny", "subject"} <= set(there):
            cases = [both_case(world, n, own_size, side) for n in range(share(EACH))]
            drawn = [maker.compared(case, [], ["canny", "subject"]) for case in cases]
            table["canny and subject"] = {"pictures": len(cases)} | _scores("canny", judge, cases, drawn) | _scores("subject", judge, cases, drawn)
            _sheet(sheets, "both", cases, drawn)
    return table


def _scores(name: str, judge: Judge, cases: Sequence[Case], drawn: Sequence[Sequence[Image.Image]]) -> dict[str, list[float]]:
    """Without the condition and with it: mean, lower and upper bound."""
    scores: dict[str, list[float]] = {}
    for k, label in enumerate(("without", "with")):
        pictures = [row[k] for row in drawn]
        if name == "subject":
            phrases = [article(case.subject) for case in cases]
            kinds = sorted(set(phrases))
            present = judge.present(pictures, kinds)
            scores[f"subject {label}"] = interval([float(present[i, kinds.index(phrase)]) for i, phrase in enumerate(phrases)])
        elif name == "layout":
            scores[f"mIoU {label}"] = interval([miou(picture, case.conditions[name]) for picture, case in zip(pictures, cases, strict=True)])
        else:
            edges = [_edges(picture) for picture in pictures]
            pairs = list(zip(edges, (case.conditions[name] for case in cases), strict=True))
            scores[f"F1 {label}"] = interval([f1(seen, wanted) for seen, wanted in pairs])
            scores[f"F1 within {SLACK:g} {label}"] = interval([f1(seen, wanted, max(1, round(SLACK * min(seen.size)))) for seen, wanted in pairs])
    return scores


def _edges(picture: Image.Image) -> Image.Image:
    try:
        return annotators.annotate("canny", picture)
    except Refused:
        return Image.new("RGB", picture.size)


def _sheet(folder: Path | None, name: str, cases: Sequence[Case], drawn: Sequence[Sequence[Image.Image]], count: int = 12) -> None:
    """Conditions, pictures without and with them, in columns; the first `count`."""
    if folder is None:
        return
    columns = [[*case.conditions.values(), *row] for case, row in zip(cases, drawn, strict=True)][:count]
    wide, high = (max(picture.size[k] for column in columns for picture in column) for k in (0, 1))
    whole = Image.new("RGB", (len(columns) * (wide + 2), len(columns[0]) * (high + 2)), (255, 255, 255))
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            shown = picture if picture.width <= wide and picture.height <= high else picture.resize((wide, high))
            whole.paste(shown, (x * (wide + 2), y * (high + 2)))
    folder.mkdir(parents=True, exist_ok=True)
    whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST).save(folder / f"{name.replace(' ', '-')}.png")
