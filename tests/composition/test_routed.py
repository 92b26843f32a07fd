"""Gates by rank and place, what sees A x, and rewritten factors, against dense oracles in float64."""

import pytest
import torch
from torch import nn

from composition.adapters.stack import Product
from tests.composition.test_stack import LAYERS, RANKS, STEP, build, dense

WEIGHTS = (0.7, 0.3, 1.0)


def ranks_of(layer, x, factors):
    """A x by each factor's own convolution or product, (rows, places, P)."""
    parts = []
    for factor in factors:
        if isinstance(layer, nn.Conv2d):
            h = nn.functional.conv2d(x, factor.down, None, layer.stride, layer.padding).flatten(2).transpose(1, 2)
        else:
            h = (x @ factor.down.T).reshape(len(x), -1, factor.rank)
        parts.append(h)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_route_sees_the_ranks_and_its_answer_is_their_gate(kind):
    layer, x, factors, gates, stack = build(kind)
    gates.use(WEIGHTS)
    seen = []
    gates.mode, gates.step = "routed", STEP
    gates.route = lambda stack, step, ranks, gate: seen.append((stack.path, step, ranks, gate)) or gate
    torch.testing.assert_close(stack(layer, x, layer(x)), dense(layer, x, factors, WEIGHTS), rtol=0, atol=1e-10)
    (path, step, ranks, gate), = seen
    assert (path, step) == ("the.layer", STEP)
    torch.testing.assert_close(ranks, ranks_of(layer, x, factors), rtol=0, atol=1e-10)
    blocks = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64) * torch.tensor(WEIGHTS)
    assert torch.allclose(gate, blocks.repeat_interleave(torch.tensor(RANKS)))


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_gate_by_row_and_place(kind):
    """Each place of each row has a gate of its own: that row and place as under constant gates of that value."""
    layer, x, factors, gates, stack = build(kind)
    gates.use((1.0, 1.0, 1.0))
    gates.mode, gates.step = "routed", STEP
    count = ranks_of(layer, x, factors).shape[1]
    even = (torch.arange(count) % 2 == 0).double()[None, :, None] * torch.arange(1, 7).double()[:, None, None]
    gates.route = lambda stack, step, ranks, gate: gate * even
    out, base = stack(layer, x, layer(x).clone()), layer(x)
    whole = dense(layer, x, factors, (1.0, 1.0, 1.0)) - base
    places = even.transpose(1, 2).reshape(6, 1, *base.shape[2:]) if isinstance(layer, nn.Conv2d) else even.reshape(6, *base.shape[1:-1], 1)
    torch.testing.assert_close(out - base, whole * places, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_watching_shows_all_ranks_whichever_is_live(kind):
    layer, x, factors, gates, stack = build(kind)
    torch.testing.assert_close(stack.ranks(layer, x, layer(x)), ranks_of(layer, x, factors), rtol=0, atol=1e-10)


def mixed(matrix):
    return lambda product: product._replace(down=(matrix @ product.down.flatten(1)).view_as(product.down))


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_rewritten_factors_act_under_every_gate(kind):
    """With R A in place of A every form is that of adapters B_k (R A)_k, and afterwards all is as before."""
    layer, x, factors, gates, stack = build(kind)
    matrix = torch.randn(10, 10, dtype=torch.float64)
    gates.use(WEIGHTS)
    before = stack(layer, x, layer(x))
    stack.rewrite(mixed(matrix))
    down = (matrix @ torch.cat([factor.down.flatten(1) for factor in factors])).split(RANKS)
    other = [type(f)(part.view_as(f.down), f.up) for f, part in zip(factors, down, strict=True)]
    torch.testing.assert_close(stack(layer, x, layer(x)), dense(layer, x, other, WEIGHTS), rtol=0, atol=1e-9)
    gates.use((0.0, 0.9, 0.0))
    torch.testing.assert_close(stack(layer, x, layer(x)), dense(layer, x, other, (0.0, 0.9, 0.0)), rtol=0, atol=1e-9)
    gates.per_row([(1, 0, 0)] * 2 + [(0, 1, 0)] * 4)
    expected = torch.cat([dense(layer, x[:2], other, (1, 0, 0)), dense(layer, x[2:], other, (0, 1, 0))])
    torch.testing.assert_close(stack(layer, x, layer(x)), expected, rtol=0, atol=1e-9)
    delta = stack.delta(WEIGHTS, torch.device("cpu"), torch.float64).view_as(layer.weight)
    torch.testing.assert_close(delta, dense_update(other, layer), rtol=0, atol=1e-9)
    stack.rewrite(None)
    gates.use(WEIGHTS)
    assert torch.equal(stack(layer, x, layer(x)), before)


def dense_update(factors, layer):
    parts = [w * c * (f.up @ f.down.flatten(1)) for f, w, c in zip(factors, WEIGHTS, (0.5, 2.0, 0.0), strict=True)]
    return sum(parts).view_as(layer.weight)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_ranks_of_no_owner_are_at_one(kind):
    """Factors with the weights in them have a gate of 1, folded and live, as long as any adapter is on."""
    layer, x, _, gates, stack = build(kind)
    down, up = torch.randn(4, *layer.weight.shape[1:], dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    stack.rewrite(lambda product: Product(down, up, None))
    gates.use(WEIGHTS)
    update = (up @ down.flatten(1)).view_as(layer.weight)
    torch.testing.assert_close(stack.delta(WEIGHTS, torch.device("cpu"), torch.float64).view_as(update), update)
    out = stack(layer, x, layer(x).clone())
    layer.weight += update
    torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-10)
