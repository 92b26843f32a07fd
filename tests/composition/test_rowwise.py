"""One adapter per row in its batched forms, against each row by itself, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composition.adapters import rowwise


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "settings"), [
    (3, {"padding": 1}), (1, {}), (3, {}), ((3, 1), {"padding": (1, 0)}), (3, {"padding": 2, "dilation": 2}), (5, {"padding": 1}),
    (3, {"padding": 1, "stride": 2}), (1, {"stride": 2}), (1, {"padding": 1}), (3, {"padding": 1, "groups": 2}),
])  # fmt: skip
@pytest.mark.parametrize("scaled", [False, True])
def test_a_convolution_row_by_row(kernel, settings, memory, scaled):
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    module = nn.Conv2d(4, 6, kernel, **settings).double().requires_grad_(False)
    x = drawn(6, 4, 9, 7).to(memory_format=memory).requires_grad_()
    down, up = drawn(3, 2, *module.weight.shape[1:]).requires_grad_(), drawn(3, 6, 2).requires_grad_()
    scale = drawn(3) if scaled else None
    y = module(x)
    got = rowwise.conv(module, x, y, down, up, scale)
    wanted = []
    for row in range(6):
        k = row // 2
        weight = (up[k] @ down[k].flatten(1)).view(6, *down.shape[2:]) if module.groups == 1 else None
        if weight is None:
            h = F.conv2d(x[row : row + 1], down[k], None, module.stride, module.padding, module.dilation, module.groups)
            part = F.conv2d(h, up[k][..., None, None])
        else:
            part = F.conv2d(x[row : row + 1], weight, None, module.stride, module.padding, module.dilation)
        wanted.append(module(x[row : row + 1]) + part * (1.0 if scale is None else scale[k]))
    expected = torch.cat(wanted)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    seed = drawn(*got.shape)
    ours = torch.autograd.grad(got, (x, down, up), seed, retain_graph=True)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (x, down, up), seed), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_padding_by_name_is_refused_in_words():
    module = nn.Conv2d(2, 2, 3, padding="same")
    with pytest.raises(ValueError, match="padded 'same'"):
        rowwise.conv(module, torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 2, 3, 3), torch.zeros(2, 2, 1), None)
