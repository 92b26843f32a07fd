"""A layer's stack against dense oracles in float64: every form, every kind of layer, ranks that differ."""

import pytest
import torch
from torch import nn

from composition.adapters.gates import Gates
from composition.adapters.stack import Stack
from composition.adapters.trainable import Shape, Trainable, TrainableStack
from composition.loop import Step
from composition.loras.kinds.lora import Factors
from tests.composition.devices.pretended import pretended

RANKS = (2, 5, 3)
STEP = Step(2, 7, torch.tensor(300.0), torch.zeros(6, 4, 2, 2))
LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (6, 7, 12)),
    "flat linear": (lambda: nn.Linear(12, 20, bias=False), (6, 12)),
    "1x1 conv": (lambda: nn.Conv2d(12, 20, 1), (6, 12, 5, 4)),
    "3x3 conv": (lambda: nn.Conv2d(12, 20, 3, padding=1), (6, 12, 5, 4)),
    "strided conv": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (6, 12, 6, 8)),
}


def build(kind, missing=(), ranks=RANKS):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind][0]().double(), LAYERS[kind][1]
    shape_in = layer.weight.shape[1:]
    factors = [None if k in missing else Factors(
        torch.randn(r, *shape_in, dtype=torch.float64), torch.randn(20, r, dtype=torch.float64))
        for k, r in enumerate(ranks)]
    gates = Gates(torch.tensor([[1.0, 1.0, 1.0], [0.5, 2.0, 0.0]], dtype=torch.float64))
    stack = Stack(factors, gates, 1, path="the.layer")
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
    gates.mode, gates.step = "combined", STEP
    gates.combine = lambda path, step, base, each: base + each.sum(0)
    torch.testing.assert_close(stack(layer, x, layer(x)), dense(layer, x, factors, weights), rtol=0, atol=1e-10)
    told = []
    gates.combine = lambda path, step, base, each: told.append((path, step)) or base + 3 * each[1]
    torch.testing.assert_close(stack(layer, x, layer(x)), dense(layer, x, factors, (0, 0.9, 0)), rtol=0, atol=1e-10)
    assert told == [("the.layer", STEP)]


@pytest.mark.parametrize("kind", LAYERS)
def test_delta_is_what_the_gates_add(kind):
    layer, x, factors, gates, stack = build(kind)
    weights = (0.7, -0.3, 1.0)
    with torch.no_grad():
        layer.weight += stack.delta(weights, layer.weight.device, torch.float64).view_as(layer.weight)
        out = layer(x)
        layer.weight -= stack.delta(weights, layer.weight.device, torch.float64).view_as(layer.weight)
        torch.testing.assert_close(out, dense(layer, x, factors, weights), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rows", ["one run each", "gathered", "several in a row"])
def test_gradients_are_the_dense_ones(kind, rows):
    """Factors that are trained get the gradient of the dense oracle, in every form."""
    layer, x, factors, gates, _ = build(kind, ranks=(3, 3, 3))
    source = Trainable("abc", 3, {"unet": {"layer": Shape.of(layer)}}, torch.device("cpu"))
    source.leaf = source.leaf.detach().double().requires_grad_(True)
    with torch.no_grad():
        for k, factor in enumerate(factors):
            layer_of = source.factors(k)["unet"]["layer"]
            layer_of.stored_down.copy_(factor.down)
            layer_of.stored_up.copy_(factor.up)
    gates.per_row(ROWS[rows])
    out = TrainableStack(source, 0, gates, 1)(layer, x, layer(x))
    gates.per_row([(0, 0.3, 0)] * 5 + [(0.1, 0, 0)])  # written before backward: the gates of the forward count
    out.square().sum().backward()
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
    expected = torch.stack([torch.cat([f.down.grad.flatten(), f.up.grad.flatten()]) for f in leaves])
    torch.testing.assert_close(source.leaf.grad, expected, rtol=1e-9, atol=1e-9)


def test_gates_are_written_in_place():
    """Changing which LoRA is live writes into the same memory: nothing is allocated, nothing becomes trainable."""
    gates = Gates(torch.ones(2, 3, dtype=torch.float64))
    gates.use((1.0, 0.5, 0.0))
    where = gates.values.dense.data_ptr()
    gates.use((0.0, 0.5, 0.25))
    assert gates.values.dense.data_ptr() == where and not gates.values.dense.requires_grad
    gates.per_row([(1, 0, 0), (0, 1, 0)])
    where = gates.values.scale.data_ptr()
    gates.per_row([(0, 0, 1), (0, 2, 0)])
    assert gates.values.scale.data_ptr() == where
    assert gates.values.scale[:, 0].tolist() == [1.0, 2.0]


def test_a_device_has_buffers_that_follow_every_write():
    """Whatever is written, by whichever door, a device's values are the CPU's, in the memory they had."""
    gates = Gates(torch.tensor([[1.0, 0.5, 2.0], [0.25, 1.0, 0.0]], dtype=torch.float64))
    with pretended() as device:
        gates.use((1.0, 0.5, 0.0))
        where = gates.on(device).dense.data_ptr()
        state = gates.snapshot()

        def same():
            for there, here in zip(gates.on(device), gates.values, strict=True):
                assert there.device == device and torch.equal(there.cpu(), here)

        same()
        gates.use((0.0, 0.5, 0.25))
        same()
        assert gates.on(device).dense.data_ptr() == where
        gates.per_row([(1, 0, 0), (0, 0, 3), (0, 2, 0)])
        same()
        gates.per_row([(1, 0.5, 0), (0, 1, 3)])
        same()
        gates.restore(state)
        same()
        assert gates.mode == "dense" and gates.on(device).dense[0, 0].tolist() == [1.0, 0.25, 0.0]


def test_the_same_weights_again_are_not_written_to_the_device():
    gates = Gates(torch.ones(2, 3, dtype=torch.float64))
    with pretended() as device:
        gates.use((1.0, 0.5, 0.0))
        buffer = gates.on(device).dense
        version = buffer._version
        gates.use((1.0, 0.5, 0.0))
        assert buffer._version == version
        gates.use((1.0, 0.75, 0.0))
        assert buffer._version > version and buffer[0, 0].tolist() == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("ranks", [(3, 3, 3), RANKS], ids=["equal ranks", "different ranks"])
def test_one_copy_of_the_factors_whatever_the_form(ranks):
    """Every form is computed from one copy in the activations' device and dtype; the source stays the caller's own tensors."""
    layer, x, factors, gates, stack = build("linear", ranks=ranks)
    layer, x = layer.float(), x.float()
    with pretended() as device, torch.no_grad():
        layer.weight, layer.bias = (nn.Parameter(weight.to(device)) for weight in (layer.weight, layer.bias))
        y = layer(x.to(device))
        for mode in ("use", "per_row", "use"):
            getattr(gates, mode)((0.5, 1.0, 0.0) if mode == "use" else ROWS["gathered"])
            stack(layer, x.to(device), y.clone())
    held = {id(value): value for value in _tensors(vars(stack)) if value.is_floating_point()}
    copies = [value for value in held.values() if value.device == device]
    sources = [value for value in held.values() if value.device != device]
    assert {id(value) for value in sources} <= {id(part) for f in factors for part in (f.down, f.up)}
    assert sum(value.numel() for value in copies) == sum(f.down.numel() + f.up.numel() for f in factors)
    assert {value.dtype for value in copies} == {torch.float32}


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Factors):
        yield from (value.down, value.up)


@pytest.mark.parametrize("form", ["use", "per_row", "regional"])
@torch.no_grad()
def test_an_output_whose_memory_is_not_in_order(form):
    """A layer may answer with a transposed view: the adapters are added to it all the same."""
    layer, x, factors, gates, stack = build("linear")
    y = layer(x).transpose(0, 1).contiguous().transpose(0, 1)
    assert not y.is_contiguous()
    if form == "per_row":
        gates.per_row(ROWS["gathered"])
        expected = torch.cat([dense(layer, x[i : i + 1], factors, w) for i, w in enumerate(ROWS["gathered"])])
    else:
        gates.use((0.7, -0.3, 1.0))
        expected = dense(layer, x, factors, (0.7, -0.3, 1.0))
    if form == "regional":
        gates.places, gates.mode = {None: torch.ones(6, 3, 7, dtype=torch.float64)}, "regional"
    torch.testing.assert_close(stack(layer, x, y), expected, rtol=0, atol=1e-10)


def test_a_row_pays_its_own_rank(monkeypatch):
    """With one adapter per row the products run over the padded rank of one adapter, never over the sum of ranks."""
    layer, x, _, gates, stack = build("linear")
    gates.per_row(ROWS["one run each"])
    seen, honest = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: seen.append(b.shape[-1]) or honest(a, b))
    with torch.no_grad():
        stack(layer, x, layer(x))
    assert seen == [max(RANKS)] and max(RANKS) < sum(RANKS)
