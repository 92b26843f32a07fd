"""Measures of retrieval against values worked out by hand, and against what chance must give."""

import math

import numpy as np
import pytest

from retrieval import metrics
from retrieval.metrics import bm25, chance, evaluate, words


def test_measures_of_a_small_ranking():
    scores = np.array([[0.9, 0.5, 0.1, 0.0], [0.9, 0.5, 0.1, 0.0]])
    relevant = np.array([[True, False, False, True], [False, False, True, False]])
    result = evaluate(scores, relevant, np.array([0, 1]))
    ideal = 1 + 1 / math.log2(3)
    assert result["R@1"].mean == 0.5 and result["R@5"].mean == 1.0
    assert result["MRR"].mean == pytest.approx((1 + 1 / 3) / 2)
    assert result["nDCG@10"].mean == pytest.approx(((1 + 1 / math.log2(5)) / ideal + 1 / math.log2(4)) / 2)
    assert evaluate(scores, relevant, np.array([0, 1]), top=2)["nDCG@2"].mean == pytest.approx(1 / ideal / 2)


def test_what_ties_is_no_better_than_chance():
    """Also when the relevant one stands first or last in the list: its place must not help."""
    for place in (0, 49):
        relevant = np.zeros((200, 50), bool)
        relevant[:, place] = True
        result = evaluate(np.zeros((200, 50)), relevant, np.arange(200), draws=50)
        assert result["R@1"].mean == pytest.approx(1 / 50, abs=0.006) and result["R@5"].mean == pytest.approx(5 / 50, abs=0.012)
    result = evaluate(chance(2000, 50), relevant[:1].repeat(2000, 0), np.arange(2000))
    assert result["R@5"].mean == pytest.approx(0.1, abs=0.025)


def test_intervals_are_over_owners():
    """Ten queries of one LoRA are one observation: the interval does not shrink because it is asked more often."""
    rng = np.random.default_rng(0)
    hits = rng.random(40) < 0.5
    scores = np.where(hits[:, None], [[1.0, 0.0]], [[0.0, 1.0]])
    relevant = np.tile([True, False], (40, 1))
    once = evaluate(scores, relevant, np.arange(40))["R@1"]
    often = evaluate(scores.repeat(10, 0), relevant.repeat(10, 0), np.arange(40).repeat(10))["R@1"]
    assert once.mean == often.mean == hits.mean() and once.low < once.mean < once.high
    assert once.high - once.low == pytest.approx(often.high - often.low)
    assert once.high - once.low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.2)
    assert str(often) == f"{often.mean:.3f} [{often.low:.3f}, {often.high:.3f}]"


def test_a_query_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="no relevant"):
        evaluate(np.zeros((1, 3)), np.zeros((1, 3), bool), np.array([0]))


def test_names_are_taken_apart():
    assert words("NeonCity_v2-final") == ["neon", "city", "v", "2", "final"]
    assert words("SDXLDragon 東京") == ["sdxl", "dragon", "東京"]
    assert words("___") == []


def test_bm25_is_its_formula():
    names = ["neon_city", "neon", "owl neon neon", "dragon"]
    scores = bm25(["a neon city", "nothing here"], names)
    lengths, mean = [2, 1, 3, 1], 7 / 4

    def part(often, holding, length):
        return math.log(1 + (4 - holding + 0.5) / (holding + 0.5)) * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * length / mean))

    expected = [part(1, 3, lengths[0]) + part(1, 1, lengths[0]), part(1, 3, lengths[1]), part(2, 3, lengths[2]), 0.0]
    np.testing.assert_allclose(scores[0], expected, rtol=1e-12)
    assert not scores[1].any() and bm25(["x"], []).shape == (1, 0)
    assert metrics.evaluate(scores[:1], np.array([[True, False, False, False]]), np.array([0]))["R@1"].mean == 1.0
