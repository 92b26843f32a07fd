"""Where each concept is: the map and the mask of every LoRA, drawn over the picture."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from app.drawing.strip import strip

SIDE = 256  # pixels of the longer side that a drawn picture has at least
HEAT = np.array([255.0, 96.0, 0.0])
DARK = 0.25  # what is left of the picture outside a mask


def drawn(picture: Image.Image, notes: Mapping[str, Any]) -> list[tuple[Image.Image, str, str]]:
    """(picture, LoRA's name, what is shown) for every map and mask in the notes; none where the method has no places."""
    masks = notes.get("masks")
    if not isinstance(masks, Mapping):
        return []
    scale = max(1, -(-SIDE // max(picture.size)))
    base = picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)
    how = notes.get("clora")
    changed = isinstance(how, Mapping) and how.get("maps") == "change"
    tiles = []
    for name, layer in masks.items():
        if "map" in layer:
            tiles.append((_heated(base, layer["map"]), str(name), "what it changes" if changed else "where it is looked at"))
        tiles.append((_masked(base, layer["mask"]), str(name), "its place"))
    return tiles


def sheet(picture: Image.Image, notes: Mapping[str, Any]) -> Image.Image | None:
    """All of them side by side; None where there is none."""
    tiles = drawn(picture, notes)
    return strip(tiles) if tiles else None


def _grown(rows: list[list[int]], size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    grey = Image.fromarray(np.asarray(rows, np.uint8)).resize(size, how)
    return np.asarray(grey, np.float32)[..., None] / 255


def _heated(base: Image.Image, rows: list[list[int]]) -> Image.Image:
    share = 0.75 * _grown(rows, base.size, Image.Resampling.BILINEAR)
    grey = np.asarray(base.convert("L").convert("RGB"), np.float32)
    return Image.fromarray((grey * (1 - share) + HEAT * share).round().astype(np.uint8))


def _masked(base: Image.Image, rows: list[list[int]]) -> Image.Image:
    share = _grown(rows, base.size, Image.Resampling.NEAREST)
    return Image.fromarray((np.asarray(base, np.float32) * (DARK + (1 - DARK) * share)).round().astype(np.uint8))
