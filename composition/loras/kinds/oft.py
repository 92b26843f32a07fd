"""OFT and BOFT: the outputs of a layer rotated, block by block, as LyCORIS and kohya write it (arXiv 2306.07280, 2311.06243).

Each block B makes Q = B - B^T and the rotation R = (I + Q) (I - Q)^-1. OFT has one block for each run of outputs and turns it by R^T; BOFT
has several such layers one after the other, between which outputs change places as in a butterfly, and turns by R. `alpha` is no
strength: times the number of outputs it bounds |Q|, all blocks together, and 0 or none bounds nothing. `rescale` multiplies the rotated
rows. The bias is not rotated.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.base import Forward, Operator, Update, linear, wide


@dataclass(frozen=True, eq=False)
class OFT(Operator):
    """blocks: (count, n, n), or (layers, count, n, n) of BOFT. rescale: of outputs. bound: of |Q|, 0 for none."""

    blocks: Float[Tensor, "*layers count n n"]
    rescale: Float[Tensor, "out"] | None = None
    bound: float = 0.0

    @property
    def live(self) -> bool:
        return bool((self.blocks != self.blocks.mT).any()) or self.rescale is not None and bool((self.rescale != 1).any())

    def rotations(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "*layers count n n"]:
        blocks = self.blocks.to(device, dtype)
        skew = blocks - blocks.mT
        if self.bound > 0 and (length := float(torch.linalg.vector_norm(skew))) > self.bound:
            skew = skew * (self.bound / length)
        unit = torch.eye(skew.shape[-1], device=device, dtype=dtype)
        # (I + Q) and (I - Q)^-1 commute
        return torch.linalg.solve(unit - skew, unit + skew)

    def _turned(self, y: Float[Tensor, "*places out"], rotations: Tensor) -> Tensor:
        """y rotated and rescaled."""
        count, side = rotations.shape[-3:-1]
        if rotations.ndim == 3:
            out = torch.einsum("knm,...kn->...km", rotations, y.unflatten(-1, (count, side))).flatten(-2)
        else:
            out = y
            for level, rotation in enumerate(rotations):
                reach = 2**level * (side // 2)
                out = out.unflatten(-1, (-1, 2, reach)).transpose(-2, -1).flatten(-3).unflatten(-1, (count, side))
                out = torch.einsum("kij,...kj->...ki", rotation, out).flatten(-2)
                out = out.unflatten(-1, (-1, reach, 2)).transpose(-2, -1).flatten(-3)
        return out if self.rescale is None else out * self.rescale.to(out)

    def delta(self, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "out in *kernel"]:
        rows = weight.movedim(0, -1)
        return (self._turned(rows, self.rotations(weight.device, weight.dtype)) - rows).movedim(-1, 0)

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        rotations = self.rotations(like.device, wide(like))
        if rotations.ndim == 3 and self.rescale is None:  # R - I is what is small and must not be rounded away
            change = (rotations - torch.eye(rotations.shape[-1]).to(rotations)).to(like)
            turn = lambda y: self._turned(y, change)  # noqa: E731
        else:
            turn = lambda y: (self._turned(y.to(rotations), rotations) - y).to(y)  # noqa: E731
        if isinstance(layer, nn.Conv2d):
            return lambda layer, x, y: turn(linear(layer, y).movedim(1, -1)).movedim(-1, 1)
        return lambda layer, x, y: turn(linear(layer, y))

    def part(self, part: Part) -> Update:
        side = self.blocks.shape[-1]
        if self.blocks.ndim == 4 or part.turned or part.start % side or (part.stop or 0) % side:
            return super().part(part)
        stop = None if part.stop is None else part.stop // side
        skew = (self.blocks - self.blocks.mT).to(self.dtype)
        length = float(torch.linalg.vector_norm(skew))  # of all blocks: the bound is theirs together
        bound = 0.0 if not self.bound or length <= self.bound else self.bound
        blocks = self.blocks[part.start // side : stop]
        if bound:
            blocks = blocks.to(self.dtype) * (bound / length)
        return OFT(blocks, None if self.rescale is None else part.rows(self.rescale))
