"""LoRA and LoCon: the change of a layer's weight is alpha / rank * up @ down (arXiv 2106.09685).

With LoCon's Tucker core, `lora_mid`, the kernel of `down` is the core times the pointwise `lora_down`: the same rank, exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.stored_down, self.stored_up

    @property
    def nbytes(self) -> int:
        return self.stored_down.nbytes + self.stored_up.nbytes

    @property
    def factors(self) -> "Factors":
        return self

    def delta(self, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "out in *kernel"]:
        """The change of a layer's weight, where that is and in its dtype."""
        return (self.up.to(weight).flatten(1) @ self.down.to(weight).flatten(1)).view(weight.shape)

    def shift(self, like: Tensor) -> Tensor | None:
        return None

    def forward(self, layer: nn.Module, like: Tensor) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        """What it adds to the layer's output. In a layer's stack the factors go with those of other adapters instead."""
        down, up = self.down.to(like), self.up.flatten(1).to(like)

        def add(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            if isinstance(layer, nn.Conv2d):
                h = F.conv2d(x.to(down), down, None, layer.stride, layer.padding, layer.dilation, layer.groups)
                return F.conv2d(h, up[..., None, None])
            return F.linear(F.linear(x.to(down), down), up)

        return add

    def part(self, part: Part) -> "Factors":
        """The share of one of the layers that a fused layer's factors are of; down is the same tensor."""
        return Factors(self.stored_down, part.rows(self.stored_up), self.alpha)


def cored(core: Float[Tensor, "r s kh kw"], down: Float[Tensor, "s in"]) -> Float[Tensor, "r in kh kw"]:
    """A Tucker core and the pointwise factor before it as one kernel; float64 where either is."""
    dtype = torch.promote_types(torch.promote_types(core.dtype, down.dtype), torch.float32)
    return torch.einsum("rshw,si->rihw", core.to(dtype), down.to(dtype))


def sized(down: Tensor, up: Tensor, alpha: float | None, size: tuple[int, ...]) -> Factors:
    """Factors in the shape of a layer of this size (out, in, *kernel). Raises ValueError, in plain words, when they do not fit.

    A linear and a 1x1 convolution are the same thing written as 2-D or 4-D: each is taken for the other; a kernel may lie flat beside its inputs.
    """
    if down.ndim < 2 or not down.numel() or not up.numel():
        raise ValueError(f"its factors {tuple(up.shape)} and {tuple(down.shape)} are empty or no matrices")
    outputs, inputs, *kernel = size
    rank = down.shape[0]
    wanted = ((rank, inputs, *kernel), (outputs, rank, *(1 for _ in kernel)))
    flat = (rank, inputs * math.prod(kernel))
    if _bare(tuple(down.shape)) not in (_bare(wanted[0]), flat) or _bare(tuple(up.shape)) != _bare(wanted[1]):
        raise misfit(f"its factors {tuple(up.shape)} x {tuple(down.shape)}", size)
    return Factors(down.reshape(wanted[0]), up.reshape(wanted[1]), alpha)


def misfit(what: str, size: tuple[int, ...]) -> ValueError:
    return ValueError(f"{what} do not fit a layer of shape {size} (out, in): it was made for a model of another width")


def _bare(size: tuple[int, ...]) -> tuple[int, ...]:
    return size[:2] if size[2:] == (1, 1) else size
