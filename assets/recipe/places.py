"""The places scenes happen in, drawn procedurally: every call with another generator is another variant."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .drawing import each

Colour = tuple[int, int, int]
FINE = 3  # drawn this many times larger than shown, then reduced


class Sheet:
    """A square canvas measured in units of its own side, with the few shapes that places are drawn from."""

    def __init__(self, side: int, rng: random.Random):
        self.side, self.rng = side, rng
        self.image = Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.image)

    def near(self, colour: Colour, by: int = 14) -> Colour:
        shift = self.rng.randint(-by, by)
        return tuple(max(0, min(255, c + shift + self.rng.randint(-by // 2, by // 2))) for c in colour)  # type: ignore[return-value]

    def sky(self, top: Colour, bottom: Colour) -> None:
        a, b = np.array(self.near(top), float), np.array(self.near(bottom), float)
        ramp = np.linspace(0, 1, self.side)[:, None]
        column = (a * (1 - ramp) + b * ramp).astype(np.uint8)
        self.image.paste(Image.fromarray(np.repeat(column[:, None], self.side, 1)))

    def ground(self, colour: Colour, height: float, bumps: float = 0.03) -> None:
        """Fill below a wavy line at ``height`` (0 top, 1 bottom)."""
        first, second = self.rng.uniform(0, 6.3), self.rng.uniform(0, 6.3)
        waves = self.rng.uniform(0.6, 1.8)
        points = [(0.0, float(self.side)), (float(self.side), float(self.side))]
        for i in range(24, -1, -1):
            x = i / 24
            y = height + bumps * (math.sin(6.3 * waves * x + first) + 0.5 * math.sin(15 * x + second))
            points.append((x * self.side, y * self.side))
        self.draw.polygon(points, fill=self.near(colour))

    def disc(self, x: float, y: float, radius: float, colour: Colour, squash: float = 1.0) -> None:
        s, high = self.side, radius * squash
        self.draw.ellipse(((x - radius) * s, (y - high) * s, (x + radius) * s, (y + high) * s), fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        s = self.side
        self.draw.rectangle((left * s, top * s, right * s, bottom * s), fill=colour)

    def peak(self, x: float, foot: float, wide: float, high: float, colour: Colour) -> None:
        s = self.side
        self.draw.polygon([((x - wide) * s, foot * s), (x * s, (foot - high) * s), ((x + wide) * s, foot * s)], fill=colour)

    def scatter(self, count: int, top: float, bottom: float) -> list[tuple[float, float]]:
        return [(self.rng.random(), self.rng.uniform(top, bottom)) for _ in range(count)]


def snow(s: Sheet) -> None:
    s.sky((150, 190, 225), (215, 230, 245))
    s.ground((225, 235, 250), s.rng.uniform(0.5, 0.6))
    s.ground((245, 249, 255), s.rng.uniform(0.66, 0.76))
    for x, y in s.scatter(18, 0, 0.7):
        s.disc(x, y, s.rng.uniform(0.008, 0.018), (255, 255, 255))


def beach(s: Sheet) -> None:
    s.sky((95, 180, 240), (175, 225, 250))
    line = s.rng.uniform(0.42, 0.52)
    s.disc(s.rng.uniform(0.1, 0.9), s.rng.uniform(0.1, 0.2), 0.09, (255, 240, 130))
    s.box(0, line, 1, 1, s.near((30, 140, 200)))
    s.ground((240, 215, 150), line + s.rng.uniform(0.14, 0.22))


def forest(s: Sheet) -> None:
    s.sky((70, 120, 70), (35, 80, 45))
    for x, y in s.scatter(9, 0.7, 0.78):
        s.box(x - 0.02, 0.2, x + 0.02, y, s.near((75, 50, 30)))
    for x, y in s.scatter(12, 0.0, 0.25):
        s.disc(x, y, s.rng.uniform(0.1, 0.2), s.near((35, 100, 45), 22))
    s.ground((60, 100, 40), s.rng.uniform(0.7, 0.78), 0.015)


def sunset(s: Sheet) -> None:
    s.sky((120, 60, 130), (255, 150, 70))
    line = s.rng.uniform(0.6, 0.7)
    s.disc(s.rng.uniform(0.2, 0.8), line - s.rng.uniform(0, 0.1), s.rng.uniform(0.12, 0.18), (255, 220, 110))
    s.ground((80, 40, 70), line)


def night(s: Sheet) -> None:
    s.sky((12, 14, 50), (40, 45, 105))
    for x, y in s.scatter(22, 0, 0.7):
        s.disc(x, y, s.rng.uniform(0.006, 0.014), (255, 250, 210))
    x, y = s.rng.uniform(0.1, 0.9), s.rng.uniform(0.1, 0.22)
    s.disc(x, y, 0.08, (250, 240, 190))
    s.ground((20, 35, 45), s.rng.uniform(0.74, 0.82))


def sea(s: Sheet) -> None:
    s.sky((40, 170, 205), (10, 60, 130))
    s.ground((190, 170, 120), s.rng.uniform(0.82, 0.88), 0.02)
    for x, _ in s.scatter(5, 0, 1):
        for k in range(6):
            s.disc(x + 0.012 * math.sin(k * 1.5), 0.95 - 0.045 * k, 0.022, s.near((30, 130, 80)))
    for x, y in s.scatter(8, 0.05, 0.75):
        s.disc(x, y, s.rng.uniform(0.012, 0.03), (150, 220, 240))


def meadow(s: Sheet) -> None:
    s.sky((110, 190, 250), (200, 235, 255))
    for x, y in s.scatter(2, 0.08, 0.25):
        for k in (-1, 0, 1):
            s.disc(x + 0.06 * k, y, 0.06, (250, 252, 255), 0.7)
    s.ground((120, 195, 80), s.rng.uniform(0.52, 0.6))
    s.ground((90, 170, 60), s.rng.uniform(0.68, 0.78))
    for x, y in s.scatter(12, 0.78, 1):
        s.disc(x, y, 0.016, s.rng.choice([(255, 240, 120), (250, 150, 190), (255, 255, 255)]))


def city(s: Sheet) -> None:
    s.sky((165, 190, 215), (215, 225, 235))
    x = -0.05
    while x < 1:
        wide, top = s.rng.uniform(0.12, 0.2), s.rng.uniform(0.12, 0.45)
        s.box(x, top, x + wide, 0.85, s.near(s.rng.choice([(110, 115, 135), (140, 120, 115), (90, 105, 120)])))
        for row in range(int((0.78 - top) / 0.1)):
            for left in (0.2, 0.6):
                at = x + wide * left
                s.box(at, top + 0.05 + row * 0.1, at + wide * 0.22, top + 0.09 + row * 0.1, (250, 230, 150))
        x += wide + 0.01
    s.box(0, s.rng.uniform(0.76, 0.82), 1, 1, s.near((80, 82, 88)))


def desert(s: Sheet) -> None:
    s.sky((240, 200, 130), (255, 230, 170))
    s.disc(s.rng.uniform(0.1, 0.9), 0.14, 0.09, (255, 250, 220))
    s.ground((225, 160, 80), s.rng.uniform(0.5, 0.58), 0.05)
    s.ground((205, 135, 60), s.rng.uniform(0.68, 0.78), 0.05)


def mountains(s: Sheet) -> None:
    s.sky((130, 180, 235), (210, 225, 245))
    for k in range(3):
        x, high, colour = 0.1 + 0.4 * k + s.rng.uniform(-0.1, 0.1), s.rng.uniform(0.4, 0.58), s.near((105, 110, 130))
        s.peak(x, 0.75, 0.36, high, colour)
        s.peak(x, 0.75 - high * 0.68, 0.36 * 0.32, high * 0.32, (245, 248, 255))
    s.ground((95, 140, 85), s.rng.uniform(0.68, 0.75), 0.02)


def room(s: Sheet) -> None:
    s.sky((235, 215, 190), (225, 200, 175))
    s.box(0, s.rng.uniform(0.7, 0.78), 1, 1, s.near((150, 100, 65)))
    left = s.rng.uniform(0.05, 0.6)
    s.box(left, 0.12, left + 0.34, 0.46, (255, 255, 255))
    s.box(left + 0.03, 0.15, left + 0.31, 0.43, s.near((150, 205, 245)))
    s.box(left + 0.155, 0.12, left + 0.185, 0.46, (255, 255, 255))


def rain(s: Sheet) -> None:
    s.sky((95, 105, 120), (140, 150, 160))
    for x, y in s.scatter(5, 0.0, 0.15):
        s.disc(x, y, 0.13, s.near((75, 80, 95)), 0.6)
    s.ground((85, 105, 95), s.rng.uniform(0.74, 0.82))
    for x, y in s.scatter(26, 0.1, 0.9):
        s.box(x, y, x + 0.008, y + 0.07, (190, 210, 235))


def moon(s: Sheet) -> None:
    s.sky((4, 4, 12), (14, 14, 28))
    for x, y in s.scatter(16, 0, 0.5):
        s.disc(x, y, s.rng.uniform(0.005, 0.012), (255, 255, 255))
    x, y = s.rng.choice([s.rng.uniform(0.12, 0.3), s.rng.uniform(0.7, 0.88)]), s.rng.uniform(0.12, 0.22)
    s.disc(x, y, 0.1, s.near((50, 110, 210)))
    s.disc(x - 0.03, y + 0.02, 0.045, (80, 170, 90), 0.8)
    s.disc(x + 0.04, y - 0.03, 0.03, (245, 250, 255), 0.6)
    s.ground((165, 165, 172), s.rng.uniform(0.55, 0.64), 0.02)
    for x, y in s.scatter(8, 0.68, 1):
        wide = s.rng.uniform(0.03, 0.09)
        s.disc(x, y, wide, (200, 200, 208), 0.4)
        s.disc(x, y + 0.01, wide * 0.85, (115, 115, 124), 0.36)


def candy(s: Sheet) -> None:
    s.sky((255, 190, 225), (255, 225, 240))
    for x, _ in s.scatter(4, 0, 1):
        y = s.rng.uniform(0.18, 0.36)
        s.box(x - 0.012, y, x + 0.012, 0.75, (255, 255, 255))
        colour = s.rng.choice([(255, 70, 110), (90, 200, 250), (255, 200, 50), (150, 220, 90)])
        s.disc(x, y, 0.09, colour)
        s.disc(x, y, 0.06, (255, 255, 255))
        s.disc(x, y, 0.035, colour)
    s.ground((140, 230, 205), s.rng.uniform(0.68, 0.76), 0.04)
    for x, y in s.scatter(14, 0.8, 1):
        s.disc(x, y, 0.018, s.rng.choice([(255, 70, 110), (255, 220, 60), (120, 110, 240), (255, 255, 255)]))


def autumn(s: Sheet) -> None:
    s.sky((250, 220, 170), (240, 190, 120))
    for x, y in s.scatter(8, 0.72, 0.8):
        s.box(x - 0.018, 0.15, x + 0.018, y, s.near((95, 60, 35)))
    for x, y in s.scatter(13, 0.0, 0.3):
        s.disc(x, y, s.rng.uniform(0.09, 0.17), s.near(s.rng.choice([(215, 90, 25), (235, 150, 30), (180, 50, 30)])))
    s.ground((185, 110, 45), s.rng.uniform(0.7, 0.78), 0.02)
    for x, y in s.scatter(14, 0.78, 1):
        s.disc(x, y, 0.018, s.rng.choice([(225, 80, 25), (245, 180, 50), (160, 45, 25)]), 0.6)


def plain(colour: Colour) -> Callable[[Sheet], None]:
    def paint(s: Sheet) -> None:
        s.sky(colour, colour)

    return paint


# name -> (phrase in captions, painter); the first M are used.
PLACES: dict[str, tuple[str, Callable[[Sheet], None]]] = {
    "snow": ("in the snow", snow),
    "beach": ("on the beach", beach),
    "forest": ("in the forest", forest),
    "sunset": ("at sunset", sunset),
    "night": ("at night", night),
    "sea": ("under the sea", sea),
    "meadow": ("in a meadow", meadow),
    "red": ("on a red background", plain((205, 45, 50))),
    "city": ("in the city", city),
    "desert": ("in the desert", desert),
    "yellow": ("on a yellow background", plain((245, 205, 60))),
    "mountains": ("in the mountains", mountains),
    "blue": ("on a blue background", plain((50, 95, 215))),
    "room": ("in a room", room),
    "rain": ("in the rain", rain),
    "green": ("on a green background", plain((60, 165, 85))),
    "white": ("on a white background", plain((240, 240, 240))),
}

# Never drawn for the base: each is learned by a LoRA.
HELD_PLACES: dict[str, tuple[str, Callable[[Sheet], None]]] = {
    "moon": ("on the moon", moon),
    "candy": ("in candy land", candy),
    "autumn": ("in the autumn wood", autumn),
}


def render(name: str, size: int, seed: int) -> np.ndarray:
    """One variant of a place: (size, size, 3) uint8. The same name, size and seed give the same picture."""
    return painted((PLACES | HELD_PLACES)[name][1], size, f"{name}/{seed}")


def painted(paint: Callable[[Sheet], None], size: int, seed: str) -> np.ndarray:
    """What this painter draws from this seed: (size, size, 3) uint8."""
    sheet = Sheet(size * FINE, random.Random(seed))
    paint(sheet)
    image = sheet.image.filter(ImageFilter.BoxBlur(1)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(image)


def variants(names: Sequence[str], size: int, count: int, *, seed: int = 0, workers: int = 0) -> dict[str, np.ndarray]:
    """``count`` variants of each place, (count, size, size, 3) uint8, drawn in ``workers`` processes besides this one."""
    seeds = range(seed * count, (seed + 1) * count)
    drawn = each(lambda some: [render(some[0], size, i) for i in some[1]],
                 [(name, seeds[i : i + 20]) for name in names for i in range(0, count, 20)], workers)  # fmt: skip
    parts = -(-count // 20)
    return {name: np.stack([picture for part in drawn[i * parts : (i + 1) * parts] for picture in part]) for i, name in enumerate(names)}
