"""Fully labelled scenes for the judge: of the world, of what is held out, and of everything the art can draw."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .art import ART, GROUPS, NAMES, spellings
from .objects import HELD_OBJECTS, OBJECTS, WORN, article
from .places import HELD_PLACES, PLACES
from .styles import STYLES
from .world import World

ALSO = (*HELD_OBJECTS, *WORN, *HELD_PLACES)
START, TEST = 6 * 10**9, 7 * 10**9  # scene numbers for the judge's training and for what is measured


class Labelled(NamedTuple):
    """A picture and its labels: names of objects and things worn, place, style ("" for none), caption."""

    picture: np.ndarray  # (size, size, 3) uint8
    names: frozenset[str]
    place: str
    style: str
    caption: str


def further_names(art: str | Path) -> dict[str, str]:
    """Emoji names and code points besides the world's own: those all vendors draw, one name for one look."""
    taken = {c: n for n, c in (OBJECTS | HELD_OBJECTS).items()} | {w.code: n for n, w in WORN.items()}
    names: dict[str, str] = {}
    for entry in json.loads((Path(art) / NAMES).read_text()):
        code, label = entry["hexcode"].lower().removesuffix("-fe0f"), entry["label"].lower()
        plain = label.removesuffix(" face")
        known = {*taken.values(), *names}
        if entry.get("group") not in GROUPS or code in taken or {label, plain} & known or "thirty" in label:
            continue
        if not label.replace(" ", "").replace("-", "").isalpha() or len(label.split()) > 3 or "moon" in label:
            continue
        spelled = [[Path(art) / ART[v].format(s) for s in spellings(code)] for v in ART]
        if all(any(p.is_file() for p in paths) for paths in spelled):
            names[plain] = code
    return names


class Named(NamedTuple):
    """What scenes may hold, in the order in which it is numbered."""

    names: list[str]
    places: list[str]
    styles: list[str]


class Source:
    """Labelled scenes by number: three in four of the world and what is held out, the others of everything."""

    def __init__(self, art: str | Path, size: int, *, objects: int = 48, places: int = len(PLACES),
                 grounds: Mapping[str, np.ndarray] | None = None):  # fmt: skip
        more = further_names(art)
        common = {"objects": objects, "places": places, "size": size, "vendors": tuple(ART), "also": ALSO, "grounds": grounds}
        self.world, self.everything = World(art, **common), World(art, more=more, **common)
        self.own, self.further = list(OBJECTS)[:objects], list(more)
        self.names = [*self.own, *HELD_OBJECTS, *WORN, *self.further]
        self.places, self.styles = [*self.world.places, *HELD_PLACES], list(STYLES)

    @property
    def named(self) -> Named:
        return Named(self.names, self.places, self.styles)

    def scene(self, seed: int, **fixed) -> Labelled:
        """``fixed``: subject, place, count, wears, vendor as a World's scene takes them, and style ("" for none)."""
        rng = random.Random(f"judge/{seed}")
        wide = rng.random() < 0.25
        world = self.everything if wide else self.world
        style = fixed.pop("style", rng.choice(self.styles) if rng.random() < 0.2 else "")
        if not fixed.get("subject"):
            fixed["subject"] = rng.choice(self.further if wide else list(HELD_OBJECTS) if rng.random() < 0.3 else self.own)
        if "wears" not in fixed and rng.random() < 0.35:
            fixed["wears"] = rng.choice(list(WORN))
        fixed.setdefault("place", rng.choice(self.places))
        fixed.setdefault("count", rng.choices((1, 2, 3), (0.5, 0.38, 0.12))[0])
        scene = world.scene(seed, **fixed)
        picture, caption = scene.picture, scene.caption
        if style:
            words, draw = STYLES[style]
            picture, caption = draw(picture), f"{caption}, {words}"
        return Labelled(picture, frozenset(thing.name for thing in scene.objects), scene.place, style, caption)


def phrase(kind: str, name: str) -> str:
    """The phrase for the judge: "a fox", "on the moon", "ink drawing"."""
    if kind == "place":
        return (PLACES | HELD_PLACES)[name][0]
    return STYLES[name][0] if kind == "style" else article(name)
