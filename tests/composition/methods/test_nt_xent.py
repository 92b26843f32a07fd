"""4: NT-Xent against the formula written out with loops, and its bounds."""

import math

import pytest
import torch

from composition.methods.shared import nt_xent


def brute(maps, kinds, tau):
    """Pair by pair, as pytorch-metric-learning's NTXentLoss with cosine similarity has it."""
    unit = [m / m.norm() for m in maps]
    losses = []
    for a, kind in enumerate(kinds):
        for p, other in enumerate(kinds):
            if a == p or kind != other:
                continue
            top = math.exp(float(unit[a] @ unit[p]) / tau)
            below = sum(math.exp(float(unit[a] @ unit[n]) / tau) for n in range(len(kinds)) if kinds[n] != kind)
            losses.append(-math.log(top / (top + below)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kinds", [[0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 2, 0, 1, 2, 2], [5, 5, 5, 3]])
@pytest.mark.parametrize("tau", [0.07, 0.5, 1.0])
def test_4_is_the_formula(kinds, tau):
    maps = torch.rand(2, len(kinds), 16, generator=torch.Generator().manual_seed(len(kinds)), dtype=torch.float64)
    loss = nt_xent.nt_xent(maps, kinds, tau)
    assert loss.tolist() == pytest.approx([brute(one, kinds, tau) for one in maps], rel=1e-12)


@pytest.mark.parametrize("count, least, flat", [(2, 0.433, 1.609), (3, 0.856, 2.398), (4, 1.234, 2.944), (8, 2.349, 4.263)])
def test_4_bounds(count, least, flat):
    """N concepts with N + 2 maps each, tau 0.5: ln(1 + n e^-2) and ln(1 + n), n = (N - 1)(N + 2)."""
    kinds = [kind for kind in range(count) for _ in range(count + 2)]
    found = nt_xent.bounds(kinds)
    assert found == pytest.approx((least, flat), abs=1e-3)
    others = (count - 1) * (count + 2)
    assert found == pytest.approx((math.log(1 + others * math.exp(-2)), math.log(1 + others)))


def test_one_concept_has_nothing_to_part_and_single_maps_nothing_to_pull():
    assert nt_xent.nt_xent(torch.rand(1, 3, 4), [0, 0, 0]).tolist() == [0.0]
    with pytest.raises(ValueError, match="two maps"):
        nt_xent.nt_xent(torch.rand(1, 2, 4), [0, 1])


def test_10_constant_maps_give_no_nan():
    maps = torch.zeros(1, 4, 9, requires_grad=True)
    loss = nt_xent.nt_xent(maps, [0, 0, 1, 1])
    loss.sum().backward()
    assert loss.isfinite().all() and maps.grad.isfinite().all()
