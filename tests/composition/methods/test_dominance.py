"""Order, refresh steps, rotation, weights: the paper's tables and CMLoRA's published numbers."""

import pytest

from composition import Refused
from composition.methods.shared.dominance import coefficient, leader, ordered, refreshes, weights

KINDS = {"ink": "style", "moon": "place", "owl": "character", "hat": "clothing", "rose": "object", "odd": ""}


def test_by_category_a_character_is_first_and_places_are_low():
    assert ordered(list(KINDS), KINDS) == (("owl", "hat", "rose", "odd", "ink"), ("moon",))


def test_without_categories_the_order_is_the_requests_and_none_is_low():
    assert ordered(["b", "a"], {}) == (("b", "a"), ())


def test_what_is_pinned_comes_first():
    names = ["owl", "moon", "ink"]
    assert ordered(names, KINDS, "ink") == (("ink", "owl"), ("moon",))
    assert ordered(names, KINDS, "moon, ink, owl", "none") == (("moon", "ink", "owl"), ())
    assert ordered(names, KINDS, low="owl,ink") == (("moon",), ("owl", "ink"))


def test_by_category_can_be_asked_for_by_name():
    assert ordered(list(KINDS), KINDS, "category") == ordered(list(KINDS), KINDS)
    assert ordered(["owl", "moon", "hat"], KINDS, "category", "hat") == (("owl", "moon"), ("hat",))
    assert ordered(["a", "category"], {}, "category") == (("category", "a"), ())  # a LoRA of that name


def test_when_all_are_low_none_is():
    assert ordered(["moon", "sea"], {"moon": "place", "sea": "place"}) == (("moon", "sea"), ())


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(Refused, match="order.*'cat'.*owl"):
        ordered(["owl"], KINDS, "cat")


@pytest.mark.parametrize("steps, count", [(200, 85), (100, 43), (50, 22), (220, 92)])
def test_there_are_as_many_refreshes_as_the_released_schedule_has(steps, count):
    assert len(refreshes(steps)) == count


def test_refreshes_of_two_hundred_steps():
    found = refreshes(200)
    assert [sum(a <= step < b for step in found) for a, b in ((0, 75), (75, 175), (175, 200))] == [38, 34, 13]
    assert refreshes(7, 3) == (0, 3, 6) and refreshes(1) == (0,)


@pytest.mark.parametrize("count, u, v", [(2, 1.2, 0.8), (3, 1.6667, 0.6667), (4, 2.1538, 0.6154), (5, 2.6471, 0.5882)])
def test_first_weights_are_the_published_ones(count, u, v):
    names = list("abcde"[:count])
    found = weights(names, "b", coefficient(count, 0))
    assert found["b"] == pytest.approx(u, abs=1e-4) and found["a"] == pytest.approx(v, abs=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("turn", [0, 1, 2, 9, 99])
def test_weights_sum_to_their_number_and_end_at_composite(count, turn):
    names = list("abcde"[:count])
    c = coefficient(count, turn)
    assert sum(weights(names, "a", c).values()) == pytest.approx(count)
    assert 1.0 <= c <= max(1.0, count - 0.5)
    assert coefficient(count, 0, decay=False) == coefficient(count, turn, decay=False)
    assert weights(names, "a", 1.0) == dict.fromkeys(names, 1.0)
    assert count > 2 or turn == 0 or coefficient(count, turn) == 1.0  # two LoRAs are at Composite after one refresh


def test_the_lead_goes_round_the_high_early_and_round_all_but_the_first_late():
    high, low = ("a", "b"), ("z",)
    assert [leader(high, low, turn, late=False) for turn in range(4)] == ["a", "b", "a", "b"]
    assert [leader(high, low, turn, late=True) for turn in range(4)] == ["b", "z", "b", "z"]
    assert {leader(high, low, turn, late=True, low_only=True) for turn in range(4)} == {"z"}
    assert [leader(high, (), turn, late=True) for turn in range(3)] == ["a", "b", "a"]
