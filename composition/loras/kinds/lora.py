"""LoRA: the change of a layer's weight is alpha / rank * up @ down (arXiv 2106.09685)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from composition.loras.fused import Part
from composition.loras.layers import Layer, shape
from composition.loras.safetensors import largest


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's LoRA of one adapter; the change of its weight is up @ down.

    stored_down, stored_up: as the file has them, in its own dtype, so that a half-precision file takes no more memory than on disk.
    (r, in) and (out, r) of a linear, (r, in, kh, kw) and (out, r, 1, 1) of a convolution; of factors that were trained up is (out, r)
    always. alpha: alpha / r multiplies the product; None for 1. A weight is always a gate.
    """

    stored_down: Float[Tensor, "r in *kernel"]
    stored_up: Float[Tensor, "out r *ones"]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.stored_down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def dtype(self) -> torch.dtype:
        """float64 where the file has float64, float32 otherwise: every stored number is one exactly."""
        return torch.float64 if torch.float64 in (self.stored_down.dtype, self.stored_up.dtype) else torch.float32

    @property
    def down(self) -> Float[Tensor, "r in *kernel"]:
        return self.stored_down.to(self.dtype)

    @property
    def up(self) -> Float[Tensor, "out r *ones"]:
        """With alpha / rank in it. Computed at every call: stack it, do not keep it."""
        wide = self.stored_up.to(self.dtype)
        return wide if self.scale == 1.0 else wide * self.scale

    @property
    def peak(self) -> float:
        """The largest absolute value of `up`, without making it."""
        return (torch.tensor(largest(self.stored_up), dtype=self.dtype) * abs(self.scale)).item()

    @property
    def live(self) -> bool:
        """False when its update is exactly zero."""
        return self.peak > 0 and largest(self.stored_down) > 0

    def part(self, part: Part) -> "Factors":
        """The share of one of the layers that a fused layer's factors are of; down is the same tensor."""
        return Factors(self.stored_down, part.rows(self.stored_up), self.alpha)


def fitted(
    down: Tensor, up: Tensor, alpha: float, layers: Mapping[str, Layer], parts: Sequence[Part]
) -> dict[str, Factors]:
    """By path, the factors in the shape that each layer has. Raises ValueError, in plain words, when they do not fit.

    A linear and a 1x1 convolution are the same thing written as 2-D or 4-D: each is taken for the other.
    """
    if down.ndim < 2 or not down.numel() or not up.numel():
        raise ValueError(f"its factors {tuple(up.shape)} and {tuple(down.shape)} are empty or no matrices")
    rank = down.shape[0]
    shapes = [shape(layers[part.path]) for part in parts]
    _, inputs, *kernel = shapes[0]
    outputs = sum(size[0] for size in shapes)
    wanted = ((rank, inputs, *kernel), (outputs, rank, *(1 for _ in kernel)))
    if any(_bare(tuple(factor.shape)) != _bare(size) for factor, size in zip((down, up), wanted, strict=True)):
        raise ValueError(f"its factors {tuple(up.shape)} x {tuple(down.shape)} do not fit a layer of shape "
                         f"{(outputs, inputs, *kernel)} (out, in): it was made for a model of another width")
    whole = Factors(down.reshape(wanted[0]), up.reshape(wanted[1]), alpha)
    if not math.isfinite(whole.scale) or not math.isfinite(whole.peak):
        raise ValueError(f"alpha {alpha:g} makes its numbers infinite")
    return {part.path: whole.part(part) for part in parts}


def _bare(size: tuple[int, ...]) -> tuple[int, ...]:
    return size[:2] if size[2:] == (1, 1) else size
