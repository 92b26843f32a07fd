"""GLoRA: the change of a layer's weight is (W A + B) alpha / rank, A and B of low rank (arXiv 2306.07967).

A = a1 a2 acts on the layer's inputs before its own weight, B = b1 b2 beside it, as LyCORIS writes it. Its first files had the numbers 1
and 2 the other way round; shapes tell.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.base import Forward, Operator, base
from composition.loras.kinds.lora import Factors


@dataclass(frozen=True, eq=False)
class GLoRA(Operator):
    """before: A, (in, r) and (r, in). beside: B, with the scale in it. scale: alpha / rank, of A."""

    before: Factors
    beside: Factors
    scale: float

    @property
    def rank(self) -> int:
        return self.beside.rank

    @property
    def live(self) -> bool:
        return bool(self.scale) and (self.before.live or self.beside.live)

    def delta(self, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "out in *kernel"]:
        up, down = self.before.up.to(weight), self.before.down.to(weight)
        turned = torch.einsum("oi...,ir,rj->oj...", weight, up, down) * self.scale
        return turned + self.beside.delta(weight)

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        up, down = (self.before.up * self.scale).to(like), self.before.down.to(like)
        beside = self.beside.forward(layer, like)

        def add(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            x = x.to(up)
            read = torch.einsum("ir,rj,nj...->ni...", up, down, x) if isinstance(layer, nn.Conv2d) else x @ down.T @ up.T
            return base(layer, read) + beside(layer, x, y)

        return add

    def part(self, part: Part) -> "GLoRA":
        return GLoRA(self.before, self.beside.part(part), self.scale)
