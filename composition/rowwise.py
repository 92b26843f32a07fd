"""One adapter per row, for a linear layer and a convolution: as many operations whatever the number of adapters.

Rows come in runs of equal length; run i is the rows that go through factors i. scale: a weight for each run, None
where all are 1. Batched forms of composition.stack, which chooses them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def linear(
    x: Float[Tensor, "rows *tokens in"], y: Float[Tensor, "rows *tokens out"], down: Float[Tensor, "runs r in"],
    up: Float[Tensor, "runs out r"], scale: Float[Tensor, "runs"] | None,
) -> Float[Tensor, "rows *tokens out"]:
    """y and the adapters' part: two batched products over (runs, rows of a run * tokens, in). y may be written in place."""
    runs = len(down)
    h = torch.bmm(x.to(down.dtype).reshape(runs, -1, x.shape[-1]), down.transpose(1, 2))
    if scale is not None:
        h = h * scale.view(-1, 1, 1)
    if y.is_contiguous() and not (torch.is_grad_enabled() and (h.requires_grad or y.requires_grad)):
        return y.view(runs, -1, y.shape[-1]).baddbmm_(h, up.transpose(1, 2)).view(y.shape)
    return y + torch.bmm(h, up.transpose(1, 2)).view(y.shape)


def conv(
    module: nn.Conv2d, x: Float[Tensor, "rows C H W"], y: Float[Tensor, "rows out h w"],
    down: Float[Tensor, "runs r Cg kh kw"], up: Float[Tensor, "runs out r"], scale: Float[Tensor, "runs"] | None,
) -> Float[Tensor, "rows out h w"]:
    """y and the adapters' part."""
    runs, x = len(down), x.to(down.dtype)
    if runs == 1:
        h = F.conv2d(x, down[0], None, module.stride, module.padding, module.dilation, module.groups)
    else:
        h = _downward(module, x, down)
    h = h.flatten(2).unflatten(0, (runs, -1))
    if scale is not None:
        h = h * scale.view(-1, 1, 1, 1)
    return y + torch.matmul(up[:, None], h).view(y.shape)


def _downward(
    module: nn.Conv2d, x: Float[Tensor, "rows C H W"], down: Float[Tensor, "runs r Cg kh kw"]
) -> Float[Tensor, "rows r h w"]:
    """Each run through its own kernels.

    Every place is multiplied with every tap of the kernel at once, and the products are summed where they meet. On a
    processor this costs less than a grouped convolution or one convolution per run, forward and backward, and it holds
    9 r numbers a place where laying out the input would hold 9 C. A stride takes the grouped convolution.
    """
    runs, rank, _, high, wide = down.shape
    rows, channels, height, width = x.shape
    padding, dilation = _pair(module.padding), _pair(module.dilation)
    reach = [step * (side - 1) for step, side in zip(dilation, (high, wide), strict=True)]
    if _pair(module.stride) != (1, 1) or module.groups > 1 or any(pad > room for pad, room in zip(padding, reach, strict=True)):
        beside = x.unflatten(0, (runs, -1)).transpose(0, 1).flatten(1, 2)  # (rows of a run, runs * C, H, W)
        h = F.conv2d(beside, down.flatten(0, 1), None, module.stride, padding, dilation, runs * module.groups)
        return h.unflatten(1, (runs, rank)).transpose(0, 1).flatten(0, 1)
    taps = down.flip(-2, -1).permute(0, 1, 3, 4, 2).reshape(runs, 1, rank * high * wide, channels)
    products = torch.matmul(taps, x.flatten(2).unflatten(0, (runs, -1)))
    if (high, wide) == (1, 1):
        return products.view(rows, rank, height, width)
    inner = [room - pad for room, pad in zip(reach, padding, strict=True)]
    size = (height + padding[0] - inner[0], width + padding[1] - inner[1])
    # As one picture of many channels: over many pictures a GPU goes one by one in the backward of `fold`.
    whole = products.view(1, rows * rank * high * wide, height * width)
    return F.fold(whole, size, (high, wide), dilation, (inner[0], inner[1])).view(rows, rank, *size)


def _pair(value: Any) -> tuple[int, int]:
    """A setting for height and width. Raises ValueError for a padding by name, which no model here has."""
    if isinstance(value, str):
        raise ValueError(f"a convolution padded {value!r} cannot have an adapter row by row")
    return tuple(value)
