"""LoKr: the change of a layer's weight is a Kronecker product of a small and a larger matrix, times alpha / rank.

Either is stored whole or as two factors, the larger one of a convolution also with a Tucker core. Where both are whole alpha is ignored, as
LyCORIS and PEFT's readers do. The product is never formed to run it: the input is laid out as (small, large), the larger matrix acts on the
one side and the smaller one on the other.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.base import Forward, Operator, wide
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import largest

Side = Tensor | Factors


@dataclass(frozen=True, eq=False)
class LoKr(Operator):
    """small: (a, b); large: (c, d, *kernel); the layer is (a c, b d, *kernel). Whole tensors or factors. scale: alpha / rank.

    rows: of the product's rows those that the layer has, of a fused layer.
    """

    small: Side
    large: Side
    scale: float
    rows: Part = Part("")

    @property
    def rank(self) -> int:
        """That its file states; 0 where both are whole."""
        return max((side.rank for side in (self.small, self.large) if isinstance(side, Factors)), default=0)

    @property
    def live(self) -> bool:
        return bool(self.scale) and all(side.live if isinstance(side, Factors) else largest(side) > 0 for side in (self.small, self.large))

    def sides(self, device: torch.device, dtype: torch.dtype) -> tuple[Float[Tensor, "a b"], Float[Tensor, "c d *kernel"]]:
        """Both, whole; the scale is in the small one."""
        return whole(self.small, device, dtype) * self.scale, whole(self.large, device, dtype)

    def delta(self, weight: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "out in *kernel"]:
        small, large = self.sides(weight.device, weight.dtype)
        product = torch.kron(small.view(*small.shape, *(1 for _ in large.shape[2:])), large.contiguous())
        return self.rows.rows(product).reshape(weight.shape)

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        small, large = (side.to(like) for side in self.sides(like.device, wide(like)))
        (a, b), (c, d) = small.shape, large.shape[:2]
        rows, everything = self.rows, self.rows[1:] == (0, None, False)

        def share(y: Tensor, axis: int) -> Tensor:
            return y if everything else rows.rows(y.transpose(0, axis)).transpose(0, axis)

        def add(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            x = x.to(small)
            if isinstance(layer, nn.Conv2d):
                count = x.shape[0]
                h = F.conv2d(x.reshape(count * b, d, *x.shape[2:]), large, None, layer.stride, layer.padding, layer.dilation)
                h = torch.einsum("ab,nbchw->nachw", small, h.unflatten(0, (count, b)))
                return share(h.reshape(count, a * c, *h.shape[3:]), 1)
            h = F.linear(x.unflatten(-1, (b, d)), large)  # (..., b, c)
            return share(torch.matmul(small, h).flatten(-2), -1)

        return add

    def part(self, part: Part) -> "LoKr":
        return replace(self, rows=part)


def whole(side: Side, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A side as one tensor."""
    if isinstance(side, Tensor):
        return side.to(device, dtype)
    return (side.up.to(device, dtype).flatten(1) @ side.down.to(device, dtype).flatten(1)).view(side.stored_up.shape[0], *side.stored_down.shape[1:])


def size(side: Side) -> tuple[int, ...]:
    return tuple(side.shape) if isinstance(side, Tensor) else (side.stored_up.shape[0], *side.stored_down.shape[1:])
