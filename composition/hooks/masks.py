"""Maps to masks: which concept owns which part of the picture (CLoRA, arXiv 2403.19776, section 3).

A map says where a concept's words are looked at, or how much its LoRA changes there what the base alone predicts.
Shapes: maps (B, T, h, w), T tokens of one concept; strengths and masks (B, K, h, w), K concepts, masks 0 to 1, without the base, which
owns what no LoRA claims.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from composition import pictures
from composition.request import Lora

EPSILON = 1e-6
TIE = 1e-6  # strengths nearer than this are equal: which of them is greater would be the order of the LoRAs' doing


def normalised(maps: Float[Tensor, "... h w"]) -> Float[Tensor, "... h w"]:
    """Each map from 0 to 1; a constant one becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + EPSILON)


def claimed(maps: Float[Tensor, "B T h w"], threshold: float) -> Float[Tensor, "B h w"]:
    """1 where any token's map exceeds `threshold` times its own maximum, else 0."""
    peak = maps.amax((-2, -1), keepdim=True)
    return (maps > threshold * peak).any(1).to(maps.dtype)


def changes(values: Float[Tensor, "N R B C H W"], size: tuple[int, int]) -> Float[Tensor, "B K h w"]:
    """How much each concept's pass changes the base's prediction, place by place, float32 (float64 stays).

    values: the base's pass first, then the K = N - 1 concepts'. size: (h, w). It is the positive row's difference, as a root mean square over
    the channels, averaged over the places of the grid, in the prediction's own units. No paper's; LoRAtorio (arXiv 2508.11624) weighs
    patches by a kindred measure.
    """
    rows = values[:, -1].to(torch.promote_types(values.dtype, torch.float32))
    apart = (rows[1:] - rows[:1]).square().mean(2).sqrt()
    return F.adaptive_avg_pool2d(apart.transpose(0, 1), size)


def standing(strength: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """How far a place stands out from each concept's mean over the picture, in its standard deviations; 0 for a constant one."""
    mean, spread = strength.mean((-2, -1), keepdim=True), strength.std((-2, -1), keepdim=True, correction=0)
    return (strength - mean) / (spread + EPSILON)


def leading(strength: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """1 for the concept of greatest strength at a place, or for each of several equal ones, 0 for the others and for strengths of -inf."""
    return ((strength >= strength.amax(1, keepdim=True) - TIE) & (strength > -torch.inf)).to(strength.dtype)


def closed(masks: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """Holes and clefts of one place filled: dilated, then eroded, by 3 x 3; beyond the border nothing is claimed."""
    wide = F.max_pool2d(F.pad(masks, (2, 2, 2, 2)), 3, 1, 1)
    return -F.max_pool2d(-wide, 3, 1, 1)[..., 2:-2, 2:-2]


def grown(masks: Float[Tensor, "B K h w"], places: int) -> Float[Tensor, "B K h w"]:
    """Widened by so many places on every side."""
    return F.max_pool2d(masks, 2 * places + 1, 1, places)


def parted(masks: Float[Tensor, "B K h w"], strength: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """Where several claim a place, only the one of greatest strength keeps it, or each of several equal ones."""
    return masks * leading(torch.where(masks > 0, strength, -1.0))


def resized(masks: Float[Tensor, "B K h w"], size: tuple[int, int], *, soft: float = 0.0) -> Float[Tensor, "B K H W"]:
    """To another grid: nearest, or with an edge softened by `soft` of its places (a Gaussian's sigma)."""
    wide = masks
    if size[0] >= masks.shape[-2] and size[1] >= masks.shape[-1] and masks.shape[-2:] != size:
        wide = F.interpolate(masks, size, mode="nearest-exact")
    elif masks.shape[-2:] != size:
        wide = F.adaptive_avg_pool2d(masks, size)
    return blurred(wide, soft) if soft else wide


def blurred(maps: Float[Tensor, "B K h w"], sigma: float) -> Float[Tensor, "B K h w"]:
    """Gaussian blur; at the border the outermost places are repeated."""
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(maps.shape[1], 1, -1)
    wide = F.conv2d(F.pad(maps, (reach, reach, 0, 0), mode="replicate"), kernel[:, :, None, :], groups=maps.shape[1])
    return F.conv2d(F.pad(wide, (0, 0, reach, reach), mode="replicate"), kernel[..., None], groups=maps.shape[1])


def shares(masks: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K1 h w"]:
    """The base's share first, then each concept's: they sum to 1 everywhere.

    The base has what no LoRA claims (1 - the sum, at least 0); where several claim, each has an equal part of its claim.
    """
    base = (1 - masks.sum(1, keepdim=True)).clamp(min=0)
    whole = torch.cat([base, masks], 1)
    return whole / whole.sum(1, keepdim=True)


def region(lora: Lora, size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """A LoRA's region, a box in fractions of the picture or a mask image (white is its place; its path or a data URL), on this grid.

    A place that a box covers in part has that part. Raises Refused for an image that cannot be read.
    """
    if lora.region is None:
        raise ValueError("this LoRA has no region")
    if isinstance(lora.region, tuple):
        x0, y0, x1, y1 = lora.region
        return _covered(y0, y1, size[0])[:, None] * _covered(x0, x1, size[1])[None]
    grey = pictures.mask(lora.region, lora.name).resize((size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(grey, np.float32) / 255)


def _covered(low: float, high: float, count: int) -> Float[Tensor, " count"]:
    """How much of each of `count` equal parts of 0..1 lies between low and high."""
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    return ((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * count).float()


def as_bytes(maps: Float[Tensor, "h w"]) -> Sequence[Sequence[int]]:
    """A map or mask as rows of whole numbers 0 to 255, for notes."""
    return (maps.detach().float().clamp(0, 1) * 255).round().int().tolist()
