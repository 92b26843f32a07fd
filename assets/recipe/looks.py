"""Styles and places of the pool alone (`pool`): neither the base, nor the judge, nor a bundled LoRA has seen them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from .places import Sheet
from .styles import slopes, width

LIGHT = np.array([0.299, 0.587, 0.114], np.float32)  # what each colour adds to brightness


def old(picture: np.ndarray) -> np.ndarray:
    """Brown and pale, darker towards the corners; (size, size, 3) uint8 both ways, as all styles."""
    grey = (picture @ LIGHT)[..., None] / 255
    across = np.linspace(-1, 1, picture.shape[0])
    edge = 1 - 0.35 * np.clip(across[:, None] ** 2 + across**2 - 0.3, 0, 1)[..., None]
    return (np.array([60, 40, 22]) + grey * np.array([180, 165, 130]) * edge).clip(0, 255).astype(np.uint8)


def negative(picture: np.ndarray) -> np.ndarray:
    """Every colour is its opposite."""
    return 255 - picture


def blueprint(picture: np.ndarray) -> np.ndarray:
    """White lines on blue paper with a grid."""
    stroke = width(picture)
    across, down = slopes(np.asarray(Image.fromarray(picture).convert("L"), np.float32), stroke)
    line = np.clip((np.hypot(across, down) - 10) / 50, 0, 1)
    rows = np.arange(len(picture)) % (16 * stroke // 2) == 0
    drawn = np.maximum(line, 0.25 * (rows[:, None] | rows))[..., None]
    return (np.array([22, 60, 150]) * (1 - drawn) + np.array([235, 245, 255]) * drawn).astype(np.uint8)


def dots(picture: np.ndarray) -> np.ndarray:
    """Discs of ink on paper, larger where it is dark; their colour is that of the place."""
    cell = 4 * width(picture) // 2
    small = Image.fromarray(picture).resize((picture.shape[1] // cell, picture.shape[0] // cell), Image.Resampling.BOX)
    few = np.asarray(small.resize(picture.shape[1::-1], Image.Resampling.NEAREST), np.float32)
    at = (np.arange(len(picture)) % cell - (cell - 1) / 2) / cell
    far = np.hypot(at[:, None], at)[..., None]
    inside = far < (0.25 + 0.5 * (1 - (few @ LIGHT)[..., None] / 255))
    return np.where(inside, few * 0.9, 248).astype(np.uint8)


def thermal(picture: np.ndarray) -> np.ndarray:
    """Brightness as the colours of a thermal camera: blue, violet, red, yellow."""
    grey = np.asarray(Image.fromarray(picture).convert("L").filter(ImageFilter.GaussianBlur(width(picture))), np.float32)
    ramp = np.array([[5, 5, 60], [70, 10, 150], [200, 30, 90], [250, 130, 20], [255, 245, 150]], np.float32)
    stops = np.linspace(0, 255, len(ramp))
    return np.stack([np.interp(grey, stops, ramp[:, colour]) for colour in range(3)], -1).astype(np.uint8)


def glass(picture: np.ndarray) -> np.ndarray:
    """Panes of one strong colour each, between dark bars."""
    pane = 8 * width(picture) // 2
    small = Image.fromarray(picture).resize((picture.shape[1] // pane, picture.shape[0] // pane), Image.Resampling.BOX)
    few = np.asarray(small.resize(picture.shape[1::-1], Image.Resampling.NEAREST), np.float32)
    strong = np.clip((few - 128) * 1.5 + 135, 0, 255)
    bar = np.arange(len(picture)) % pane == 0
    return np.where((bar[:, None] | bar)[..., None], 25, strong).astype(np.uint8)


def lava(s: Sheet) -> None:
    s.sky((60, 15, 15), (170, 50, 20))
    s.peak(s.rng.uniform(0.3, 0.7), 0.7, 0.4, s.rng.uniform(0.35, 0.5), s.near((45, 35, 38)))
    s.ground((35, 28, 30), s.rng.uniform(0.64, 0.72))
    for x, y in s.scatter(6, 0.74, 0.95):
        s.disc(x, y, s.rng.uniform(0.07, 0.16), (255, 110, 20), 0.28)
        s.disc(x, y, s.rng.uniform(0.03, 0.06), (255, 220, 80), 0.28)


def library(s: Sheet) -> None:
    s.sky((110, 70, 40), (85, 52, 30))
    colours = [(170, 40, 40), (40, 90, 140), (60, 120, 70), (200, 160, 60), (120, 60, 120)]
    for row in range(4):
        top, x = 0.03 + 0.19 * row, 0.0
        while x < 1:
            wide = s.rng.uniform(0.025, 0.06)
            s.box(x, top + s.rng.uniform(0, 0.04), x + wide - 0.005, top + 0.16, s.near(s.rng.choice(colours)))
            x += wide
        s.box(0, top + 0.16, 1, top + 0.18, (60, 36, 20))
    s.box(0, s.rng.uniform(0.79, 0.84), 1, 1, s.near((140, 35, 45)))


def cave(s: Sheet) -> None:
    s.sky((30, 90, 150), (150, 215, 240))
    for k in range(9):
        x, high = k / 8 + s.rng.uniform(-0.05, 0.05), s.rng.uniform(0.12, 0.4)
        s.peak(x, 0.0, 0.07, -high, s.near((205, 240, 252)))
        s.peak(x, 1.0, 0.09, high * 0.6, s.near((175, 225, 245)))
    s.ground((215, 240, 250), s.rng.uniform(0.8, 0.87), 0.02)


def fair(s: Sheet) -> None:
    s.sky((250, 225, 150), (255, 240, 200))
    wide, first = s.rng.uniform(0.09, 0.12), s.rng.uniform(0, 0.1)
    for k in range(12):
        left = first + (k - 1) * wide
        s.box(left, 0.1, left + wide, s.rng.uniform(0.68, 0.72), (205, 40, 60) if k % 2 else (250, 250, 245))
    for x, y in s.scatter(10, 0.02, 0.12):
        s.disc(x, y, 0.025, s.rng.choice([(255, 210, 60), (60, 150, 230), (80, 190, 90)]))
    s.ground((150, 175, 80), s.rng.uniform(0.7, 0.76), 0.01)


# name -> (words in captions, function on a picture)
STYLES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "old photograph": ("old photograph", old),
    "negative film": ("negative film", negative),
    "blueprint": ("blueprint", blueprint),
    "comic dots": ("comic dots", dots),
    "thermal camera": ("thermal camera", thermal),
    "stained glass": ("stained glass", glass),
}

# name -> (phrase in captions, painter)
PLACES: dict[str, tuple[str, Callable[[Sheet], None]]] = {
    "volcano": ("on a volcano", lava),
    "library": ("in a library", library),
    "ice cave": ("in an ice cave", cave),
    "fair": ("at the fair", fair),
}
