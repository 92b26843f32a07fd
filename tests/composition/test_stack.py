"""A layer's stack against dense oracles in float64: every form, every kind of layer, ranks that differ."""

import pytest
import torch
from torch import nn

from composition.adapters.stack import Gates, Stack
from composition.loras.kinds.lora import Factors

RANKS = (2, 5, 3)
LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (6, 7, 12)),
    "flat linear": (lambda: nn.Linear(12, 20, bias=False), (6, 12)),
    "1x1 conv": (lambda: nn.Conv2d(12, 20, 1), (6, 12, 5, 4)),
    "3x3 conv": (lambda: nn.Conv2d(12, 20, 3, padding=1), (6, 12, 5, 4)),
    "strided conv": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (6, 12, 6, 8)),
}


def build(kind, missing=()):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind][0]().double(), LAYERS[kind][1]
    shape_in = layer.weight.shape[1:]
    factors = [None if k in missing else Factors(
        torch.randn(r, *shape_in, dtype=torch.float64), torch.randn(20, r, dtype=torch.float64))
        for k, r in enumerate(RANKS)]
    found = [f for f in factors if f is not None]
    gates = Gates(torch.tensor([[1.0, 1.0, 1.0], [0.5, 2.0, 0.0]], dtype=torch.float64))
    ends = torch.tensor([f.rank if f else 0 for f in factors]).cumsum(0).tolist()
    stack = Stack(torch.cat([f.down for f in found]), torch.cat([f.up for f in found], 1),
                  list(zip([0, *ends[:-1]], ends, strict=True)), gates, 1)
    return layer, torch.randn(shape, dtype=torch.float64), factors, gates, stack


def dense(layer, x, factors, weights):
    """W + sum_k w_k c_k B_k A_k with the block factors c = (0.5, 2, 0), computed on a copy of the layer."""
    update = torch.zeros_like(layer.weight)
    for factor, weight, block in zip(factors, weights, (0.5, 2.0, 0.0), strict=True):
        if factor is not None:
            update += weight * block * (factor.up @ factor.down.flatten(1)).view_as(update)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, layer.weight + update, layer.bias)
    return nn.functional.conv2d(x, layer.weight + update, layer.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("missing", [(), (1,)], ids=["all", "one adapter lacks the layer"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weights", [(0.7, -0.3, 1.0), (0.0, 0.9, 0.0), (1.0, 0.0, 0.0), (0.4, 0.2, 0.0)])
@torch.no_grad()
def test_use(kind, weights, missing):
    layer, x, factors, gates, stack = build(kind, missing)
    gates.use(weights)
    assert gates.mode == ("one" if sum(map(bool, weights)) == 1 else "dense")
    torch.testing.assert_close(stack(layer, x, layer(x)), dense(layer, x, factors, weights), rtol=0, atol=1e-10)


ROWS = {
    "one run each": [(1, 0, 0)] * 2 + [(0, 1, 0)] * 2 + [(0, 0, 1)] * 2,
    "gathered": [(0, 0.5, 0)] * 3 + [(0.9, 0, 0)] * 3,
    "uneven runs": [(0, 0.5, 0), (0.9, 0, 0), (0.9, 0, 0), (0.9, 0, 0), (0, 0, 0), (0, 1, 0)],
    "rows of the base": [(0, 0, 0)] * 3 + [(0, 1.5, 0)] * 3,
    "several in a row": [(1, 0.5, 0), (0, 1, 0), (0, 0, 0), (0.1, 0.2, 0.3), (1, 0, 0), (0, 1, 1)],
}


@pytest.mark.parametrize("missing", [(), (0,)], ids=["all", "one adapter lacks the layer"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_rows(kind, rows, missing):
    layer, x, factors, gates, stack = build(kind, missing)
    gates.per_row(ROWS[rows])
    assert gates.mode == ("dense" if rows == "several in a row" else "rows")
    out = stack(layer, x, layer(x))
    for row, weights in enumerate(ROWS[rows]):
        expected = dense(layer, x[row : row + 1], factors, weights)
        torch.testing.assert_close(out[row : row + 1], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_combined_sees_each_adapter(kind):
    """`combine` gets the base's output and every adapter's own; summing them is dense, taking one is that one."""
    layer, x, factors, gates, stack = build(kind)
    weights = (0.7, 0.3, 1.0)
    gates.use(weights)
    gates.mode = "combined"
    gates.combine = lambda base, each: base + each.sum(0)
    torch.testing.assert_close(stack(layer, x, layer(x)), dense(layer, x, factors, weights), rtol=0, atol=1e-10)
    gates.combine = lambda base, each: base + 3 * each[1]
    torch.testing.assert_close(stack(layer, x, layer(x)), dense(layer, x, factors, (0, 0.9, 0)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_delta_is_what_the_gates_add(kind):
    layer, x, factors, gates, stack = build(kind)
    weights = (0.7, -0.3, 1.0)
    with torch.no_grad():
        layer.weight += stack.delta(weights, torch.float64).view_as(layer.weight)
        out = layer(x)
        layer.weight -= stack.delta(weights, torch.float64).view_as(layer.weight)
        torch.testing.assert_close(out, dense(layer, x, factors, weights), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rows", ["one run each", "gathered", "several in a row"])
def test_gradients_are_the_dense_ones(kind, rows):
    """Factors that are trained get the gradient of the dense oracle, in every form."""
    layer, x, factors, gates, stack = build(kind)
    stack.down.requires_grad_(True)
    stack.up.requires_grad_(True)
    gates.per_row(ROWS[rows])
    stack(layer, x, layer(x)).square().sum().backward()
    leaves = [Factors(f.down.clone().requires_grad_(True), f.up.clone().requires_grad_(True)) for f in factors]

    def update(weights):
        parts = [w * c * (f.up @ f.down.flatten(1)) for f, w, c in zip(leaves, weights, (0.5, 2.0, 0.0), strict=True)]
        return sum(parts).view_as(layer.weight)

    total = 0
    for row, weights in enumerate(ROWS[rows]):
        weight, part = layer.weight + update(weights), x[row : row + 1]
        out = (nn.functional.linear(part, weight, layer.bias) if isinstance(layer, nn.Linear) else
               nn.functional.conv2d(part, weight, layer.bias, layer.stride, layer.padding))
        total = total + out.square().sum()
    total.backward()
    torch.testing.assert_close(stack.down.grad, torch.cat([f.down.grad for f in leaves]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stack.up.grad, torch.cat([f.up.grad for f in leaves], 1), rtol=1e-9, atol=1e-9)


def test_gates_are_written_in_place():
    """Changing which LoRA is live writes into the same memory: nothing is allocated, nothing becomes trainable."""
    gates = Gates(torch.ones(2, 3, dtype=torch.float64))
    gates.use((1.0, 0.5, 0.0))
    where = gates.dense.data_ptr()
    gates.use((0.0, 0.5, 0.25))
    assert gates.dense.data_ptr() == where and not gates.dense.requires_grad
    gates.per_row([(1, 0, 0), (0, 1, 0)])
    where = gates.scale.data_ptr()
    gates.per_row([(0, 0, 1), (0, 2, 0)])
    assert gates.scale.data_ptr() == where
    assert gates.scale[:, 0].tolist() == [1.0, 2.0]


def test_a_row_pays_its_own_rank(monkeypatch):
    """With one adapter per row the products run over the padded rank of one adapter, never over the sum of ranks."""
    layer, x, _, gates, stack = build("linear")
    gates.per_row(ROWS["one run each"])
    seen, honest = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: seen.append(b.shape[-1]) or honest(a, b))
    with torch.no_grad():
        stack(layer, x, layer(x))
    assert seen == [max(RANKS)] and max(RANKS) < sum(RANKS)
