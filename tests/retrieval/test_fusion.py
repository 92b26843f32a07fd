"""Reciprocal rank fusion: the formula, ties, missing evidence, and one order whatever the order of what comes in."""

import random

import pytest

from retrieval.fusion import fuse


def test_the_formula():
    hits = fuse({"weight": [("a", 0.9), ("b", 0.8)], "words": [("b", 7.0), ("c", 3.0)]}, 10)
    assert [hit.id for hit in hits] == ["b", "a", "c"]
    assert [hit.score for hit in hits] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])
    assert hits[0].ranks == {"weight": 2, "words": 1} and hits[0].scores == {"weight": 0.8, "words": 7.0}
    assert hits[1].ranks == {"weight": 1}  # missing evidence is no evidence against


def test_equal_scores_share_the_better_rank():
    hits = fuse({"words": [("a", 2.0), ("b", 2.0), ("c", 1.0)]}, 10)
    assert [hit.ranks["words"] for hit in hits] == [1, 1, 3]


def test_ties_are_ordered_by_id_and_evidence_in_any_order_gives_the_same():
    orders = {"weight": [("b", 0.5)], "text": [("a", 0.5)], "behaviour": [("c", 0.5)]}
    rng = random.Random(0)
    for _ in range(6):
        names = list(orders)
        rng.shuffle(names)
        assert [hit.id for hit in fuse({name: orders[name] for name in names}, 10)] == ["a", "b", "c"]


def test_k_and_nothing():
    assert fuse({}, 5) == [] and fuse({"words": []}, 5) == []
    assert len(fuse({"words": [(str(number), -number) for number in range(9)]}, 4)) == 4
