"""Reciprocal rank fusion: one order out of the orders that several kinds of evidence give (Cormack, Clarke, Buettcher 2009).

A row's score is the sum of 1 / (60 + rank) over the evidence that ranked it. Scores of different evidence (a cosine, BM25) are
never compared; a row that lacks some evidence loses only that evidence's share. Rows of equal score share the better rank: thirty
files that all say "dragon" are told apart by the other evidence, not by the order of their hashes.
"""

import math
from collections.abc import Mapping, Sequence

from retrieval.rows import Evidence, Hit

K = 60


def fuse(orders: Mapping[Evidence, Sequence[tuple[str, float]]], k: int) -> list[Hit]:
    """The k best of several orders of (id, score), each best first. Equal scores are ordered by id, so that the order is always the same."""
    ranks: dict[str, dict[Evidence, int]] = {}
    scores: dict[str, dict[Evidence, float]] = {}
    for evidence in sorted(orders):
        rank, before = 0, math.nan
        for place, (row, score) in enumerate(orders[evidence], start=1):
            rank, before = (rank if score == before else place), score
            ranks.setdefault(row, {})[evidence] = rank
            scores.setdefault(row, {})[evidence] = score
    hits = [Hit(row, math.fsum(1 / (K + rank) for rank in ranks[row].values()), ranks[row], scores[row]) for row in ranks]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]
