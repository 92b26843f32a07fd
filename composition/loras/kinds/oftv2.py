"""OFT as PEFT and OneTrainer write it (arXiv 2506.19847): the inputs of a layer rotated, block by block, before the layer sees them.

Of each block the file has what lies above the diagonal of a skew matrix Q, row by row. Its rotation is five terms of a series,
R = I + 2Q + 2Q^2 + 2Q^3 + Q^4, or as many as the settings say; where they say that there is no series it is (I - Q)(I + Q)^-1, which turns the other
way: a series is near (I + Q)(I - Q)^-1. The layer's weight becomes W R^T. With constraint (COFT) |Q| of each block is at most eps / sqrt(blocks).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.base import Forward, Operator, base, wide

TERMS, EPS = 5, 6e-5  # PEFT's own
MOST = 64  # terms that settings may ask for


@dataclass(frozen=True)
class Rotation:
    """How the numbers of a file become rotations. terms: of the series; 0 for none. eps: of COFT; 0 for none. scaled: Q is divided by the root of
    the count of its numbers."""

    terms: int = TERMS
    eps: float = 0.0
    scaled: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any], scaled: bool = False) -> "Rotation":
        """From PEFT's settings. Raises ValueError for what is none of it."""
        series, terms, bound, eps = (settings.get(name, usual) for name, usual in (
            ("use_cayley_neumann", True), ("num_cayley_neumann_terms", TERMS), ("coft", False), ("eps", EPS)))  # fmt: skip
        if not isinstance(series, bool) or not isinstance(bound, bool):
            raise ValueError("use_cayley_neumann and coft in its settings must be true or false")
        if isinstance(terms, bool) or not isinstance(terms, int) or not 1 <= terms <= MOST:
            raise ValueError(f"num_cayley_neumann_terms in its settings must be a whole number from 1 to {MOST}")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1e6:
            raise ValueError("eps in its settings must be a positive number")
        return cls(terms if series else 0, float(eps) if bound else 0.0, scaled)


@dataclass(frozen=True, eq=False)
class OFTv2(Operator):
    """above: (blocks, n (n - 1) / 2), of one block that all share (1, ...). inputs: of the layer."""

    above: Float[Tensor, "blocks above"]
    inputs: int
    rotation: Rotation = Rotation()

    @property
    def side(self) -> int:
        return side(self.above.shape[1])

    def changes(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "count n n"]:
        """R - I of every block of the inputs."""
        n, (rows, columns) = self.side, torch.triu_indices(self.side, self.side, 1, device=device)
        numbers = self.above.to(device, dtype)
        skew = numbers.new_zeros(len(numbers), n, n)
        skew[:, rows, columns] = numbers
        skew = skew - skew.mT
        if self.rotation.eps:
            most = self.rotation.eps / len(skew) ** 0.5
            skew = skew * (most / torch.linalg.matrix_norm(skew, keepdim=True)).clamp(max=1.0)  # of a zero block: times 1
        if self.rotation.scaled:
            skew = skew / self.above.shape[1] ** 0.5
        return _changes(skew, self.rotation.terms).expand(self.inputs // n, n, n)

    def _turned(self, rows: Float[Tensor, "*places in"], changes: Tensor) -> Tensor:
        return torch.einsum("...kn,knm->...km", rows.unflatten(-1, (-1, self.side)), changes).flatten(-2)

    def delta(self, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "out in *kernel"]:
        changes = self.changes(weight.device, weight.dtype)
        return self._turned(weight.movedim(1, -1), changes.mT).movedim(-1, 1)

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        changes = self.changes(like.device, wide(like)).to(like)
        if isinstance(layer, nn.Conv2d):
            return lambda layer, x, y: base(layer, self._turned(x.movedim(1, -1), changes).movedim(-1, 1))
        return lambda layer, x, y: base(layer, self._turned(x, changes))

    def part(self, part: Part) -> "OFTv2":
        return self  # parts of a fused layer have its inputs


def side(above: int) -> int:
    """n of a block that has so many numbers above its diagonal; 0 where there is none."""
    n = round((1 + (1 + 8 * above) ** 0.5) / 2)
    return n if above > 0 and n * (n - 1) // 2 == above else 0


def _changes(skew: Float[Tensor, "k n n"], terms: int) -> Float[Tensor, "k n n"]:
    if not terms:
        unit = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
        return torch.linalg.solve(unit + skew, -2 * skew)  # (I - Q)(I + Q)^-1 - I; they commute
    if terms == 1:
        return torch.zeros_like(skew)
    total, power = 2 * skew, skew
    last = max(terms - 1, 3) if terms > 2 else 0  # the highest power counts once; PEFT's three and four terms are the same
    for exponent in range(2, last + 1):
        power = power @ skew
        total = total + (power if exponent == last else 2 * power)
    return total
