"""Conditions: pictures that control, by the banks of their condition LoRAs (EasyControl, arXiv 2503.07027, and its kin).

A condition's tokens see neither the noise nor the time, so what they say in every layer is computed once: a bank per condition, kept across
steps, seeds and batches, keyed by all that it depends on.
"""

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from composition.loras.condition import Settings

Grid = tuple[int, int]  # (rows, columns) of tokens


# where its tokens stand, and what is encoded ---------------------------------------------------------------------------


def ids(settings: Settings, over: Grid, grid: Grid) -> Float[Tensor, "N 3"]:
    """The position ids of a condition's tokens, float32, row after row. over: the picture's tokens; grid: the condition's own."""
    if settings.kind == "subject":
        return subject_ids(grid, max(settings.offset, over[0]) if settings.clear else settings.offset, rounded=settings.rounded)
    return spatial_ids(grid, over, rounded=settings.rounded)


def spatial_ids(grid: Grid, over: Grid, *, rounded: bool = False) -> Float[Tensor, "N 3"]:
    """Stretched over the whole picture, from its upper left corner: token (i, j) at (0, i * rows ratio, j * columns ratio).

    rounded: to bfloat16, as in the published code, which shifts some by up to an eighth of a place.
    """
    return _ids(torch.arange(grid[0]) * (over[0] / grid[0]), torch.arange(grid[1]) * (over[1] / grid[1]), rounded)


def subject_ids(grid: Grid, offset: int, *, rounded: bool = False) -> Float[Tensor, "N 3"]:
    """A grid of its own, `offset` rows below the picture's first."""
    return _ids(torch.arange(grid[0]) + offset, torch.arange(grid[1]), rounded)


def _ids(rows: Tensor, columns: Tensor, rounded: bool) -> Float[Tensor, "N 3"]:
    places = torch.zeros(len(rows), len(columns), 3)
    places[..., 1] += rows[:, None]
    places[..., 2] += columns
    return (places.bfloat16().float() if rounded else places).flatten(0, 1)


def pixels(picture: Image.Image, settings: Settings, unit: int) -> Float[Tensor, "1 3 side side"]:
    """The picture of a condition as it is encoded, -1 to 1: a square of its LoRA's size, in whole tokens of `unit` pixels.

    A spatial one is stretched to it; a subject keeps its shape, in the middle, on the LoRA's ground, which also shows through what is
    transparent.
    """
    side = max(unit, settings.size // unit * unit)
    picture = flattened(picture, settings.colour)
    if settings.kind == "spatial":
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
    else:
        scale = side / max(picture.size)
        wide, high = (max(unit, round(length * scale / unit) * unit) for length in picture.size)
        ground = Image.new("RGB", (side, side), settings.colour)
        ground.paste(picture.resize((wide, high), Image.Resampling.BILINEAR), ((side - wide) // 2, (side - high) // 2))
        picture = ground
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def flattened(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Without transparency: what is clear shows this colour."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, (*colour, 255)), clear).convert("RGB")
    return picture.convert("RGB")
