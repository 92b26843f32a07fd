"""How well LoRAs are found: R@k, MRR and nDCG with intervals over LoRAs, and two rankings that nothing should lose to: file names, and chance."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")


@dataclass(frozen=True)
class Estimate:
    """A mean with the interval that holds 95 % of its bootstrap."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def evaluate(
    scores: Float[np.ndarray, "q n"], relevant: Bool[np.ndarray, "q n"], owners: Int[np.ndarray, " q"], *, top: int = 10, draws: int = 20,
    samples: int = 2000, seed: int = 0,
) -> dict[str, Estimate]:
    """R@1, R@5, MRR and nDCG@`top` of queries against n LoRAs; a query with nothing relevant is an error (ValueError).

    R@k: the share of queries with a relevant LoRA among the first k. owners: the LoRA, or concept, that each query is about: means are over
    queries, the bootstrap draws owners with all their queries, since those of one are not independent. Ties are broken at random, `draws` times.
    """
    relevant = np.asarray(relevant, bool)
    if not relevant.any(1).all():
        raise ValueError("a query has no relevant LoRA")
    values = {name: rows.mean(0) for name, rows in _each(np.asarray(scores, np.float64), relevant, top, draws, seed).items()}
    _, owner = np.unique(owners, return_inverse=True)
    counts = np.bincount(owner)
    picks = np.random.default_rng(seed).integers(len(counts), size=(samples, len(counts)))
    estimates = {}
    for name, rows in values.items():
        sums = np.bincount(owner, rows)
        means = sums[picks].sum(1) / counts[picks].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        estimates[name] = Estimate(float(rows.mean()), float(low), float(high))
    return estimates


def _each(scores: np.ndarray, relevant: np.ndarray, top: int, draws: int, seed: int) -> dict[str, Float[np.ndarray, "draws q"]]:
    """By name of the measure, its value for every draw and query."""
    rng = np.random.default_rng(seed)
    if not any(len(np.unique(row)) < len(row) for row in scores):
        draws = 1
    gains = 1 / np.log2(np.arange(2, scores.shape[1] + 2))
    best = np.minimum(relevant.sum(1), top)
    ideal = np.cumsum(gains)[best - 1]
    rows: dict[str, list[np.ndarray]] = {"R@1": [], "R@5": [], "MRR": [], f"nDCG@{top}": []}
    for _ in range(draws):
        order = np.lexsort((rng.random(scores.shape), -scores), axis=1)
        hits = np.take_along_axis(relevant, order, 1)
        first = hits.argmax(1)
        for name, value in zip(rows, (first < 1, first < 5, 1 / (first + 1), (hits[:, :top] * gains[:top]).sum(1) / ideal), strict=True):
            rows[name].append(value.astype(np.float64))
    return {name: np.stack(parts) for name, parts in rows.items()}


def words(text: str) -> list[str]:
    """The words of a text or of a file's name, in lower case: "NeonCity_v2" is neon, city, v, 2."""
    return [word.lower() for word in _WORD.findall(text)]


def bm25(queries: Sequence[str], documents: Sequence[str], k1: float = 1.2, b: float = 0.75) -> Float[np.ndarray, "q n"]:
    """Scores of documents, such as file names, by the words they share with each query (Okapi BM25 as Lucene has it); 0 for none."""
    counts = [Counter(words(document)) for document in documents]
    lengths = np.array([count.total() for count in counts], np.float64)
    mean = max(lengths.mean(), 1e-9) if len(lengths) else 1.0
    holding: dict[str, list[int]] = {}
    for index, count in enumerate(counts):
        for word in count:
            holding.setdefault(word, []).append(index)
    scores = np.zeros((len(queries), len(documents)))
    for row, query in enumerate(queries):
        for word in words(query):
            rows = holding.get(word, [])
            weight = math.log(1 + (len(documents) - len(rows) + 0.5) / (len(rows) + 0.5))
            for index in rows:
                often = counts[index][word]
                scores[row, index] += weight * often * (k1 + 1) / (often + k1 * (1 - b + b * lengths[index] / mean))
    return scores


def chance(queries: int, documents: int, seed: int = 0) -> Float[np.ndarray, "q n"]:
    """Scores that say nothing: every order is as likely as any other."""
    return np.random.default_rng(seed).random((queries, documents))
