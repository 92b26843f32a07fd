"""DoRA: the changed weight W + D is scaled row by row, or column by column, to lengths m that the file states (arXiv 2402.09353).

    W' = c (W + D),  c = m / |W + D|,   and at weight g the layer's output gains g ((c - 1) (y - b) + c D x)

D is a LoRA, a LoHa or a LoKr. Which lengths: PEFT's `lora_magnitude_vector` has one number for each output, its norm over all that the output
reads. LyCORIS' `dora_scale` says it by its shape: (out, 1, ...) for each output, (1, in, ...) for each input, its norm over outputs and
kernel. c depends on the base's weight, so it is computed for the base at hand.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.base import Forward, Operator, Update, base, linear, weight_of


@dataclass(frozen=True, eq=False)
class DoRA(Operator):
    """inner: D. lengths: m. by_output: of rows of the weight, else of columns."""

    inner: Update
    lengths: Float[Tensor, "n"]
    by_output: bool

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def live(self) -> bool:
        """The lengths alone can change a layer; what they do shows only beside its weight."""
        return True

    def _factor(self, weight: Tensor, update: Tensor) -> Tensor:
        """c, in a shape that multiplies the weight."""
        axis = 0 if self.by_output else 1
        length = torch.linalg.vector_norm(weight + update, dim=[n for n in range(weight.ndim) if n != axis], keepdim=True)
        return self.lengths.to(weight).view(length.shape) / length.clamp_min(torch.finfo(weight.dtype).tiny)

    def delta(self, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "out in *kernel"]:
        update = self.inner.delta(weight)
        factor = self._factor(weight, update)
        return (factor - 1) * weight + factor * update

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        weight = weight_of(layer, like)
        factor = self._factor(weight, self.inner.delta(weight)).flatten()
        factor = factor.view(-1, 1, 1) if weight.ndim == 4 else factor
        more, factor, inner = (factor - 1).to(like), factor.to(like), self.inner.forward(layer, like)

        def by_output(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return more * linear(layer, y) + factor * inner(layer, x, y)

        def by_input(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            x = x.to(factor)
            return base(layer, more * x) + inner(layer, factor * x, y)

        return by_output if self.by_output else by_input

    def part(self, part: Part) -> "DoRA":
        if not self.by_output and (part.start, part.stop) != (0, None):
            raise ValueError("its lengths are of columns of several layers together, so that those of one are not known")
        return DoRA(self.inner.part(part), part.rows(self.lengths) if self.by_output else self.lengths, self.by_output)
