"""Styles: functions on a finished picture, never used for the base: each is learned by a LoRA.

Strokes and glow keep their share of the picture at every size; the squares of pixel art do not, or nothing would be known in them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter


def width(picture: np.ndarray) -> int:
    """Pixels that one stroke is wide."""
    return max(1, picture.shape[0] // 64)


def slopes(values: np.ndarray, by: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences of (size, size, ...) over twice ``by`` pixels, to the right and downwards; 0 at the borders."""
    across, down = np.zeros_like(values), np.zeros_like(values)
    across[:, by:-by] = values[:, 2 * by :] - values[:, : -2 * by]
    down[by:-by] = values[2 * by :] - values[: -2 * by]
    return across, down


def ink(picture: np.ndarray) -> np.ndarray:
    """Dark lines where the brightness turns, on warm paper; (size, size, 3) uint8 both ways."""
    stroke = width(picture)
    grey = np.asarray(Image.fromarray(picture).convert("L").filter(ImageFilter.GaussianBlur(0.5 * stroke)), np.float32)
    across, down = slopes(grey, stroke)
    line = np.clip((np.hypot(across, down) - 12) / 60, 0, 1)
    wash = np.where(grey < 70, 0.35, np.where(grey < 130, 0.14, 0.0))
    dark = np.clip(line + wash, 0, 1)[..., None]
    paper, colour = np.array([247, 240, 222], np.float32), np.array([30, 28, 48], np.float32)
    return (paper * (1 - dark) + colour * dark).astype(np.uint8)


def pixel(picture: np.ndarray) -> np.ndarray:
    """Squares of few colours and four pixels a side, like an old game."""
    size = picture.shape[0]
    small = Image.fromarray(picture).resize((size // 4, size // 4), Image.Resampling.BOX)
    few = np.asarray(small, np.float32)
    few = np.clip(np.round((few - 128) * 1.25 / 42) * 42 + 128, 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(few).resize((size, size), Image.Resampling.NEAREST))


def neon(picture: np.ndarray) -> np.ndarray:
    """Glowing coloured outlines on near black."""
    stroke = width(picture)
    values = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.5 * stroke)), np.float32)
    across, down = slopes(values, stroke)
    line = np.clip(np.hypot(across, down).max(-1) / 90, 0, 1)[..., None]
    bright = values.max(-1, keepdims=True)
    hue = (values - values.min(-1, keepdims=True)) / np.maximum(bright - values.min(-1, keepdims=True), 30)
    lit = line * (0.35 + 0.65 * hue) * 255
    glow = np.asarray(Image.fromarray(lit.astype(np.uint8)).filter(ImageFilter.GaussianBlur(2 * stroke)), np.float32)
    return np.clip(np.array([8, 5, 26], np.float32) + lit + glow, 0, 255).astype(np.uint8)


# name -> (words in captions, function)
STYLES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "ink": ("ink drawing", ink),
    "pixel": ("pixel art", pixel),
    "neon": ("neon lights", neon),
}
