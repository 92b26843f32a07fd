"""LoHa: the change of a layer's weight is the entrywise product of two low-rank matrices times alpha / rank (arXiv 2108.06098).

With `hada_t1` and `hada_t2` each of the two is a Tucker product, as LoCon's with a core. Entry by entry, the product of matrices of ranks
r and s is one of rank r s, whose factors are all products of a factor of the one with a factor of the other (Khatri-Rao).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.base import Forward, Operator, applied, wide
from composition.loras.kinds.lora import Factors


@dataclass(frozen=True, eq=False)
class LoHa(Operator):
    """first, second: the two, each as factors. scale: alpha / rank."""

    first: Factors
    second: Factors
    scale: float

    @property
    def rank(self) -> int:
        """Of each of the two."""
        return self.first.rank

    @property
    def live(self) -> bool:
        return bool(self.scale) and self.first.live and self.second.live

    @property
    def factors(self) -> Factors | None:
        """The product as factors where they cost less than the matrix itself; None else."""
        down, up = self.first.down, self.first.up
        rank = self.first.rank * self.second.rank
        if rank * (up.shape[0] + down[0].numel()) > up.shape[0] * down[0].numel():
            return None
        ups = (self.first.up.flatten(1)[:, :, None] * self.second.up.flatten(1)[:, None]).flatten(1)
        downs = (self.first.down[:, None] * self.second.down[None]).flatten(0, 1)
        return Factors(downs, ups.view(*ups.shape, *(1 for _ in downs.shape[2:])), self.scale * rank)

    def delta(self, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "out in *kernel"]:
        return self.first.delta(weight) * self.second.delta(weight) * self.scale

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        shape = self.first.stored_up.shape[0], *self.first.stored_down.shape[1:]
        matrix = self.delta(torch.empty(shape, device=like.device, dtype=wide(like))).to(like)
        return lambda layer, x, y: applied(layer, x.to(matrix), matrix)

    def part(self, part: Part) -> "LoHa":
        return LoHa(self.first.part(part), self.second.part(part), self.scale)
