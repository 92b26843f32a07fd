"""(IA)3: every output of a layer, or every input, times 1 + a number of its own, as LyCORIS writes it (arXiv 2205.05638).

The change of the weight is its rows, with `on_input` its columns, times those numbers; the bias stays.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.base import Forward, Operator, base, linear


@dataclass(frozen=True, eq=False)
class IA3(Operator):
    """numbers: of outputs, or of inputs."""

    numbers: Float[Tensor, "n"]
    on_input: bool

    def delta(self, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "out in *kernel"]:
        numbers = self.numbers.to(weight)
        return weight * (numbers.view(1, -1, *(1 for _ in weight.shape[2:])) if self.on_input else numbers.view(-1, *(1 for _ in weight.shape[1:])))

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        numbers = self.numbers.to(like)
        numbers = numbers.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else numbers
        if self.on_input:
            return lambda layer, x, y: base(layer, numbers * x.to(numbers))
        return lambda layer, x, y: numbers * linear(layer, y)

    def part(self, part: Part) -> "IA3":
        return self if self.on_input else IA3(part.rows(self.numbers), False)
