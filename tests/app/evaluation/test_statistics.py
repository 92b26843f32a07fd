"""Intervals cover what they say, tests are exact where they can be counted, and groups are resampled whole."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from app.evaluation import statistics
from app.evaluation.statistics import holm, interval, paired, permuted, ranks, ratio


def grouped(rng, groups, each, between=1.0, within=0.5, mean=0.0):
    """Values that share their group's part."""
    parts = rng.normal(mean, between, groups)
    return (parts[:, None] + rng.normal(0, within, (groups, each))).ravel(), [f"g{g}" for g in range(groups) for _ in range(each)]


@pytest.mark.parametrize("groups", [6, 12, 30])
def test_the_interval_covers_the_truth_as_often_as_it_says(groups):
    rng, hits = np.random.default_rng(groups), 0
    for turn in range(400):
        values, names = grouped(rng, groups, 3, mean=2.0)
        found = interval(values, names, resamples=800, seed=turn)
        hits += found.low <= 2.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.985


def test_an_interval_that_forgets_the_groups_is_too_short():
    rng, hits = np.random.default_rng(3), 0
    for turn in range(200):
        values, _ = grouped(rng, 12, 6, mean=2.0)
        found = interval(values, [str(k) for k in range(len(values))], resamples=500, seed=turn)
        hits += found.low <= 2.0 <= found.high
    assert hits / 200 < 0.8


def test_with_many_groups_it_is_scipys_bootstrap():
    rng = np.random.default_rng(5)
    values = rng.gamma(2.0, 1.0, 400)
    ours = interval(values, [str(k) for k in range(400)], resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.02), pytest.approx(theirs.high, abs=0.02))


def test_the_mean_is_of_pictures_and_groups_of_unequal_size_count_by_their_pictures():
    found = interval([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert (found.mean, found.pictures, found.groups) == (2.0, 4, 2)
    assert found.low == 1.0 and found.high == 5.0  # all of a, all of b


def test_one_group_has_no_interval():
    assert interval([1.0, 2.0], ["a", "a"]).low is None


def test_few_groups_widen_it():
    values = [0.0, 1.0, 0.2, 0.8, 0.5]
    found = interval(values, list("abcde"), resamples=20_000)
    plain = np.quantile(np.random.default_rng(0).choice(values, (20_000, 5)).mean(1), [0.025, 0.975])
    assert found.low < plain[0] and found.high > plain[1]


def test_the_permutation_test_is_scipys_and_the_count_by_hand():
    rng = np.random.default_rng(7)
    differences = rng.normal(0.4, 1, 9)
    groups = list("abcdefghi")
    count = [abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-12 for signs in product((-1, 1), repeat=9)]
    theirs = stats.permutation_test((differences, np.zeros(9)), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert permuted(differences, groups) == pytest.approx(np.mean(count)) == pytest.approx(theirs.pvalue)


def test_signs_of_whole_groups_are_flipped():
    """Twenty pictures of two groups are two observations: no small p can come of them."""
    assert permuted([1.0] * 20, ["a"] * 10 + ["b"] * 10) == 0.5


def test_drawn_permutations_agree_with_all_of_them():
    rng = np.random.default_rng(9)
    differences, groups = rng.normal(0.5, 1, 13), [str(k) for k in range(13)]
    assert permuted(differences, groups, resamples=8000) == pytest.approx(permuted(differences, groups, resamples=8192), abs=0.02)


def test_no_difference_is_rarely_called_one():
    rng, hits = np.random.default_rng(11), 0
    for turn in range(300):
        values, names = grouped(rng, 10, 3)
        hits += permuted(values, names, seed=turn, resamples=1024) <= 0.05
    assert hits / 300 <= 0.085


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def cells(values, groups):
    return {(group, number): value for number, (group, value) in enumerate(zip(groups, values, strict=True))}


def test_pairs_are_formed_on_the_same_case_and_noise():
    """The same noise shared by two methods cancels: what one would not see, a pair shows."""
    rng = np.random.default_rng(2)
    noise, groups = rng.normal(0, 5, 24), [f"g{k // 2}" for k in range(24)]
    scores = {"a": cells(noise + 0.3, groups), "b": cells(noise + rng.normal(0, 0.05, 24), groups)}
    (found,) = paired(scores)
    assert found.significant and found.difference.mean == pytest.approx(0.3, abs=0.05) and found.better == 1.0
    assert found.effect is not None and found.effect > 3
    alone = [interval(list(scores[name].values()), groups) for name in "ab"]
    assert alone[0].low < alone[1].high and alone[1].low < alone[0].high  # the intervals of the means overlap


def test_cases_only_one_method_has_are_left_out():
    (found,) = paired({"a": {("x", 0): 2.0, ("y", 0): 3.0, ("z", 0): 90.0}, "b": {("x", 0): 1.0, ("y", 0): 1.0}})
    assert (found.difference.mean, found.difference.pictures) == (1.5, 2)


def test_rank_counts_only_who_is_told_apart():
    groups = [f"g{k}" for k in range(12)]
    base = np.linspace(0, 1, 12)
    wobble = np.where(np.arange(12) % 2, 0.4, -0.38)
    scores = {"best": cells(base + 3, groups), "same": cells(base + 3 + wobble, groups), "last": cells(base, groups)}
    pairs = paired(scores)
    means = {name: float(np.mean(list(rows.values()))) for name, rows in scores.items()}
    assert ranks(means, pairs) == {"best": 1, "same": 1, "last": 3}
    assert ranks(means, pairs, larger=False) == {"best": 2, "same": 2, "last": 1}


def test_among_many_variants_chance_is_allowed_for():
    """Twelve variants of pure noise: hardly two are told apart, though several raw p are small."""
    rng, small, significant = np.random.default_rng(4), 0, 0
    for turn in range(6):
        groups = [f"g{k}" for k in range(16)]
        found = paired({f"w{k}": cells(rng.normal(0, 1, 16), groups) for k in range(12)}, resamples=1000, seed=turn)
        small += sum(one.p <= 0.05 for one in found)
        significant += sum(one.significant for one in found)
    assert small > 6 and significant <= 2


def test_five_groups_cannot_be_told_apart():
    groups = [f"g{k}" for k in range(5)]
    (found,) = paired({"a": cells([1.0, 1.1, 1.2, 1.3, 1.4], groups), "b": cells([0.0] * 5, groups)})
    assert found.difference.low > 0 and found.p == 2 / 32 and not found.significant


def test_the_same_seed_gives_the_same_numbers():
    rng = np.random.default_rng(1)
    values, names = grouped(rng, 20, 2)
    assert interval(values, names) == interval(values, names)
    assert interval(values, names, seed=1) != interval(values, names, seed=2)
    assert statistics.RESAMPLES >= 10_000


def test_a_ratio_is_of_sums_and_its_interval_covers_the_truth():
    """What one method keeps of another's hits, in pictures that share their group's luck and each other's."""
    rng, hits = np.random.default_rng(5), 0
    for turn in range(400):
        chance = np.repeat(rng.beta(4, 2, 16), 3)
        others = (rng.random(48) < chance).astype(float)
        values = others * (rng.random(48) < 0.7)
        bounds = ratio(values.tolist(), others.tolist(), [f"g{k // 3}" for k in range(48)], resamples=400, seed=turn)
        assert bounds.mean == pytest.approx(values.sum() / others.sum())
        hits += bounds.low <= 0.7 <= bounds.high
    assert 0.9 <= hits / 400 <= 0.985


def test_a_ratio_to_ones_is_the_mean_and_draws_of_nothing_are_left_out():
    rng = np.random.default_rng(6)
    values, names = grouped(rng, 9, 2)
    assert ratio(values, [1.0] * len(values), names) == interval(values, names)
    same = ratio([0.0, 0.0, 1.0], [0.0, 0.0, 1.0], ["a", "b", "c"])
    assert (same.mean, same.low, same.high) == (1, 1, 1)
    assert ratio([1.0], [2.0], ["a"]).low is None
