"""Full differences: the change of a layer's weight, bias or both as it is, for linears, convolutions and norms.

`diff` and `diff_b` of a layer, `w_norm` and `b_norm` of a norm, `lora_B.bias` beside a LoRA: no alpha in the first two, in the last that of
its LoRA.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.base import Forward, Operator, applied


@dataclass(frozen=True, eq=False)
class Full(Operator):
    """weight: in the layer's own shape. bias: (out,). Either may be missing. scale: of both."""

    weight: Float[Tensor, "out *in"] | None
    bias: Float[Tensor, "out"] | None
    scale: float = 1.0

    def delta(self, weight: Float[Tensor, "out *in"]) -> Float[Tensor, "out *in"]:
        return torch.zeros_like(weight) if self.weight is None else self.weight.to(weight) * self.scale

    def shift(self, like: Tensor) -> Float[Tensor, "out"] | None:
        return None if self.bias is None else self.bias.to(like) * self.scale

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        weight = None if self.weight is None else (self.weight.to(like.device) * self.scale).to(like.dtype)
        bias = self.shift(like)

        def add(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            grid = y.ndim == 4
            shifted = None if bias is None else (bias.view(-1, 1, 1) if grid else bias).expand(y.shape)
            if weight is None:
                assert shifted is not None
                return shifted
            x = x.to(weight)
            if isinstance(layer, nn.LayerNorm):
                return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
            if isinstance(layer, nn.GroupNorm):
                return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
            out = applied(layer, x, weight)
            return out if shifted is None else out + shifted

        return add

    def part(self, part: Part) -> "Full":
        return Full(None if self.weight is None else part.rows(self.weight), None if self.bias is None else part.rows(self.bias), self.scale)
