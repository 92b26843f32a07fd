"""Intervals and tests for pictures that come in groups: the same prompt's pictures are not independent.

Everything is resampled by group, never by picture. Seeds and numbers of resamples are arguments, and are reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

RESAMPLES = 10_000
Key = tuple[Any, ...]  # of a case: its group, and what tells it from others of the group
LEVEL = 0.95  # of intervals; 1 - LEVEL is the bar of tests


@dataclass(frozen=True)
class Interval:
    """A mean, its confidence interval (None where there is one group only), and what it rests on."""

    mean: float
    low: float | None
    high: float | None
    pictures: int
    groups: int


@dataclass(frozen=True)
class Paired:
    """How much more `first` scores than `second` on the same cases.

    p: of a two-sided permutation test (signs of whole groups). holm: that, adjusted for all pairs of one metric together.
    effect: mean over groups of the difference, in units of its standard deviation (Cohen's d_z); None when nothing varies.
    better: share of pictures in which first scores higher, ties counted half.
    """

    first: str
    second: str
    difference: Interval
    p: float
    holm: float
    effect: float | None
    better: float

    @property
    def significant(self) -> bool:
        """Whether the two are told apart: the interval leaves 0 out and the permutation test agrees (adjusted p <= 0.05).

        Both, because an interval over few groups is too short; with five groups or fewer no test can agree. Adjusted, because
        among many variants some two always part by chance.
        """
        low, high = self.difference.low, self.difference.high
        return low is not None and high is not None and (low > 0 or high < 0) and self.holm <= 1 - LEVEL


def _sums(values: Sequence[float], groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(sum, number) of each group, groups in the order of their names."""
    _, which = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    return np.bincount(which, np.asarray(values, float)), np.bincount(which).astype(float)


def interval(values: Sequence[float], groups: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean over pictures with a bootstrap interval over groups (95 %).

    Percentiles are taken further out for few groups, as of Student's t with groups - 1 degrees of freedom (Hesterberg 2015,
    "What teachers should know about the bootstrap", expanded percentile interval).
    """
    return ratio(values, np.ones(len(values)).tolist(), groups, resamples=resamples, seed=seed)


def ratio(
    values: Sequence[float], others: Sequence[float], groups: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The sum of values over that of the others, which belong to the same pictures and are not negative, with the same interval. Their sum is
    above 0."""
    sums, numbers = _sums(values, groups)[0], _sums(others, groups)[0]
    mean = float(sums.sum() / numbers.sum())
    count = len(sums)
    if count < 2:
        return Interval(mean, None, None, len(values), count)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    below = draws @ numbers
    means = (draws @ sums)[below > 0] / below[below > 0]  # a draw without any of the others has no ratio
    low, high = np.quantile(means, [share := _tail(count), 1 - share])
    return Interval(mean, float(low), float(high), len(values), count)


def _tail(count: int) -> float:
    """The share left out on each side for this many groups."""
    from scipy.stats import norm, t

    return float(norm.cdf(np.sqrt(count / (count - 1)) * t.ppf((1 - LEVEL) / 2, count - 1)))


def permuted(differences: Sequence[float], groups: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of "no difference": the signs of whole groups are flipped, every combination where there are few enough.

    Drawn at random otherwise, and then the observed signs count as one of the draws.
    """
    sums, _ = _sums(differences, groups)
    observed, close = abs(sums.sum()), 1e-9 * max(1.0, float(np.abs(sums).sum()))
    if 2 ** len(sums) <= resamples:
        signs = np.array(list(product((-1, 1), repeat=len(sums))))
        return float(np.mean(np.abs(signs @ sums) >= observed - close))
    signs = np.random.default_rng(seed).choice((-1, 1), size=(resamples, len(sums)))
    return float((1 + np.sum(np.abs(signs @ sums) >= observed - close)) / (1 + resamples))


def holm(chances: Sequence[float]) -> list[float]:
    """p values adjusted for being several (Holm 1979)."""
    order, adjusted, largest = np.argsort(chances, kind="stable"), [0.0] * len(chances), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = float(largest)
    return adjusted


def paired(
    scores: Mapping[str, Mapping[Key, float]], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Paired]:
    """Every two methods on the cases both have: method to case (its group first) to score, in the order of the methods."""
    pairs = []
    names = list(scores)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            both = sorted(scores[first].keys() & scores[second].keys())
            if not both:
                continue
            more = [scores[first][key] - scores[second][key] for key in both]
            groups = [str(key[0]) for key in both]
            better = float(np.mean([1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in more]))
            pairs.append(Paired(
                first, second, interval(more, groups, resamples=resamples, seed=seed),
                permuted(more, groups, resamples=resamples, seed=seed), 1.0, _effect(more, groups), better))  # fmt: skip
    adjusted = holm([pair.p for pair in pairs])
    return [Paired(**{**vars(pair), "holm": p}) for pair, p in zip(pairs, adjusted, strict=True)]


def _effect(differences: Sequence[float], groups: Sequence[str]) -> float | None:
    sums, numbers = _sums(differences, groups)
    means = sums / numbers
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return float(means.mean() / spread) if spread > 1e-12 else None


def ranks(means: dict[str, float], pairs: Sequence[Paired], *, larger: bool = True) -> dict[str, int]:
    """Method to rank: 1 + the number of methods that are better and told apart from it.

    Methods that the pictures do not tell apart may share a rank; that does not prove that they are alike.
    """
    beaten = dict.fromkeys(means, 0)
    for pair in pairs:
        if pair.significant:
            first_wins = (pair.difference.mean > 0) == larger
            beaten[pair.second if first_wins else pair.first] += 1
    return {name: 1 + beaten[name] for name in means}
