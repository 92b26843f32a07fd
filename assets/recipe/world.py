"""The world Pocket learns: scenes of emoji art with captions, drawn on the fly from a seed.

A scene is one to three objects before a place. Word order is place: in "a fox and a robot" the fox stands on the left.
A few captions name an object by a strange word, so that the rest of a prompt with an unknown word still counts.
Every picture is a pure function of the world's arguments and one integer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from .art import ART, NAMES, spellings
from .objects import FACES, HELD_OBJECTS, OBJECTS, WORN, article
from .places import HELD_PLACES, PLACES
from .places import variants as variants_of

SHARES = (0.52, 0.42, 0.06)  # of scenes with one, two and three objects
KEPT = 16_384  # objects kept ready at the sizes they were drawn in
STRANGE = 0.04  # of captions, when the world has strange words
SIZES = {1: (0.55, 0.80), 2: (0.40, 0.50), 3: (0.28, 0.34), "above": (0.37, 0.46)}  # of the picture's side


class Placed(NamedTuple):
    """One object in a scene, or what it wears; x and y are its centre, wide and high its size, 0..1 from the upper left."""

    name: str
    x: float
    y: float
    wide: float
    high: float


class Scene(NamedTuple):
    picture: np.ndarray  # (size, size, 3) uint8
    caption: str
    objects: tuple[Placed, ...]
    place: str


class Sprite(NamedTuple):
    """An object at one size, premultiplied by its alpha; the shadow's margin lies below ``height``."""

    colour: np.ndarray  # (h, w, 3) uint16, premultiplied
    keep: np.ndarray  # (h, w, 1) uint16, 256 - alpha
    height: int


def open_art(art: Path, vendor: str, code: str) -> Image.Image:
    """The emoji as RGBA, cut to what is visible."""
    for spelling in spellings(code):
        path = Path(art) / ART[vendor].format(spelling)
        if path.is_file():
            image = Image.open(path).convert("RGBA")
            return image.crop(image.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox())
    raise FileNotFoundError(f"no {vendor} art for {code} under {art}: expected {path}; the stage `art` renders it from the npm art packages")


def sprite(image: Image.Image, side: int) -> Sprite:
    """Resize to ``side`` along the longer edge, with a soft shadow on the ground below."""
    scale = side / max(image.size)
    wide, high = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    margin = max(1, side // 14)
    premultiplied = image.convert("RGBa").resize((wide, high), Image.Resampling.LANCZOS)
    body = np.zeros((high + margin, wide, 4), np.float32)
    body[:high] = np.asarray(premultiplied, np.float32)
    ground = Image.new("L", (wide, high + margin))
    oval = Image.fromarray(np.full((2 * margin, max(1, int(wide * 0.8))), 90, np.uint8))
    ground.paste(oval, ((wide - oval.width) // 2, high - margin))
    shade = np.asarray(ground.filter(ImageFilter.GaussianBlur(margin * 0.7)), np.float32)
    alpha = body[..., 3] + shade * (1 - body[..., 3] / 255)
    keep = (256 - alpha * 256 / 255).round().astype(np.uint16)
    return Sprite(body[..., :3].round().astype(np.uint16), keep[..., None], high)


class World:
    """Scenes of the first ``objects`` objects and ``places`` places, of ``size`` pixels.

    ``also`` names held-out objects, places or things to wear to have at hand; they appear only when a scene asks for
    them. A vendor named twice is drawn twice as often. ``strange``: words that stand for an object in a few captions.
    ``more``: further names and their code points, as frequent as the others. ``grounds``: what `places.variants` drew ahead
    for this seed, at least ``variants`` of each place.
    """

    def __init__(
        self,
        art: str | Path,
        *,
        objects: int = 16,
        places: int = 8,
        size: int = 128,
        vendors: Sequence[str] = ("noto", "fluent"),
        seed: int = 0,
        also: Sequence[str] = (),
        variants: int = 160,
        strange: Sequence[str] = (),
        more: Mapping[str, str] | None = None,
        grounds: Mapping[str, np.ndarray] | None = None,
    ):
        if not 1 <= objects <= len(OBJECTS) or not 1 <= places <= len(PLACES):
            raise ValueError(f"a world has 1 to {len(OBJECTS)} objects and 1 to {len(PLACES)} places, not {objects} and {places}")
        self.size, self.seed, self.vendors, self.strange = size, seed, tuple(vendors), tuple(strange)
        self.objects, self.places = list(OBJECTS)[:objects], list(PLACES)[:places]
        codes = {n: OBJECTS[n] for n in self.objects} | {n: c for n, c in HELD_OBJECTS.items() if n in also}
        codes |= {n: worn.code for n, worn in WORN.items() if n in also} | dict(more or {})
        self.objects += list(more or {})
        self.art = {(n, v): open_art(Path(art), v, c) for n, c in codes.items() for v in dict.fromkeys(self.vendors)}
        drawn = [*self.places, *(n for n in HELD_PLACES if n in also)]
        self.grounds = {n: grounds[n][:variants] for n in drawn} if grounds else variants_of(drawn, size, variants, seed=seed)
        self.sprite = lru_cache(maxsize=KEPT)(lambda name, vendor, side: sprite(self.art[name, vendor], side))

    def scene(
        self, seed: int, *, subject: str | None = None, place: str | None = None, count: int | None = None,
        wears: str | None = None, vendor: str | None = None, names: Sequence[str] = (),
    ) -> Scene:  # fmt: skip
        """The scene of this seed; ``subject`` puts that object in it, ``place``, ``count`` and ``vendor`` fix the rest.

        ``names``: exactly these objects in this order, one perhaps twice. ``wears``: one of the objects wears it: the
        subject, else one of FACES.
        """
        rng = random.Random(f"{self.seed}/{seed}")
        count = count or rng.choices((1, 2, 3), SHARES)[0]
        names = list(names) or rng.sample(self.objects, min(count, len(self.objects)))
        if wears and not subject:
            subject = rng.choice([n for n in FACES if n in self.objects])
        if subject and subject not in names:
            names[rng.randrange(len(names))] = subject
        place = place or rng.choice(self.places)
        above = len(names) == 2 and not wears and rng.random() < 0.25
        picture = self.grounds[place][rng.randrange(len(self.grounds[place]))].copy()
        low, high = SIZES["above" if above else len(names)]
        shrink, room = (0.85, WORN[wears].room) if wears else (1.0, 0.0)
        placed = []
        for i, name in enumerate(names):
            drawn = vendor or rng.choice(self.vendors)
            piece = self.sprite(name, drawn, round(self.size * rng.uniform(low, high) * shrink))
            x, y = self._position(rng, i, len(names), above)
            placed.append(self._paste(picture, piece, name, x, y + room, rng.random() < 0.5))
            if wears and name == subject:
                placed.append(self._dress(picture, placed[-1], wears, drawn))
        return Scene(picture, self._caption(rng, names, place, above, subject, wears), tuple(placed), place)

    def _position(self, rng: random.Random, index: int, count: int, above: bool) -> tuple[float, float]:
        """Where an object's centre is meant to be: each has its own column (or row)."""
        jitter = lambda by: rng.uniform(-by, by)  # noqa: E731
        if count == 1:
            return 0.5 + jitter(0.14), 0.56 + jitter(0.12)
        if above:
            return 0.5 + jitter(0.16), (0.27, 0.74)[index] + jitter(0.03)
        columns = {2: (0.27, 0.73), 3: (0.18, 0.5, 0.82)}[count]
        return columns[index] + jitter(0.03), 0.6 + jitter(0.14)

    def _dress(self, picture: np.ndarray, wearer: Placed, wears: str, vendor: str) -> Placed:
        """Paste something to wear onto an object that is already there."""
        worn = WORN[wears]
        piece = self.sprite(wears, vendor, max(4, round(self.size * wearer.wide * worn.wide)))
        y = wearer.y + (worn.y - 0.5) * wearer.high
        return self._paste(picture, piece, wears, wearer.x, y, False)

    def _paste(self, picture: np.ndarray, piece: Sprite, name: str, x: float, y: float, flip: bool) -> Placed:
        """Blend a sprite into the picture in place, kept inside its borders."""
        high, wide = piece.keep.shape[:2]
        left = min(max(0, round(x * self.size - wide / 2)), self.size - wide)
        top = min(max(0, round(y * self.size - piece.height / 2)), self.size - high)
        colour, keep = (piece.colour[:, ::-1], piece.keep[:, ::-1]) if flip else (piece.colour, piece.keep)
        under = picture[top : top + high, left : left + wide]
        under[:] = np.minimum(((under * keep) >> 8) + colour, 255)
        x, y = (left + wide / 2) / self.size, (top + piece.height / 2) / self.size
        return Placed(name, x, y, wide / self.size, piece.height / self.size)

    def _caption(
        self, rng: random.Random, names: list[str], place: str, above: bool, subject: str | None, wears: str | None
    ) -> str:
        phrase = (PLACES | HELD_PLACES)[place][0]
        things = [f"{article(n)} wearing {article(wears)}" if wears and n == subject else article(n) for n in names]
        if self.strange and rng.random() < STRANGE:
            things[rng.randrange(len(things))] = article(rng.choice(self.strange))
        form = rng.random()
        if above:
            what = f"{things[0]} above {things[1]}" if form < 0.7 else f"{things[1]} below {things[0]}"
        elif len(things) == 1:
            what = things[0]
        elif len(things) == 2:
            if form < 0.6:
                what = f"{things[0]} and {things[1]}"
            elif form < 0.76:
                what = f"{things[0]} beside {things[1]}"
            else:
                what = f"{things[0]} left of {things[1]}" if form < 0.88 else f"{things[1]} right of {things[0]}"
        else:
            what = f"{things[0]}, {things[1]} and {things[2]}"
        form = rng.random()
        if form < 0.80:
            return f"{what} {phrase}"
        if form < 0.88:
            return f"{phrase}, {what}"
        if form < 0.96:
            return f"a picture of {what} {phrase}"
        return what


def strange_words(art: str | Path) -> list[str]:
    """Emoji labels of one or two words that name nothing of this world, in a picture or a LoRA."""
    known = {*OBJECTS, *HELD_OBJECTS, *WORN, *PLACES, *HELD_PLACES}
    known = {word for name in known for word in name.split()} | {w for p, _ in (PLACES | HELD_PLACES).values() for w in p.split()}
    known |= {"ink", "drawing", "pixel", "art", "neon", "lights"}
    data = json.loads((Path(art) / NAMES).read_text())
    labels = [e["label"].lower() for e in data if e.get("group") not in (0, 1, 2, None)]
    return [w for w in labels if len(w.split()) <= 2 and w.replace(" ", "").isalpha() and not known & set(w.split())]


def batch(world: World, first: int, count: int, **fixed) -> tuple[np.ndarray, list[str]]:
    """Scenes ``first`` .. ``first + count``: pictures (count, size, size, 3) uint8 and their captions."""
    scenes = [world.scene(first + i, **fixed) for i in range(count)]
    return np.stack([s.picture for s in scenes]), [s.caption for s in scenes]
