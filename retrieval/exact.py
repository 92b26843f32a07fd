"""Exact search in memory: every vector compared, every word counted. What the index uses up to its `exact_rows`.

Vectors lie in half precision. A first pass over all of them in half precision finds, within its rounding bound, every row that can
be among the best; those alone are compared in double precision. The answer is that of comparing all of them exactly, at less than
half the cost of a pass in single precision (`python -m tests.bench.retrieval`).
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from jaxtyping import Bool, Float, Int

from retrieval.rows import FILTERED, SPACES, Evidence, Filter, Space, Vector
from retrieval.schema import matrix, sizes
from retrieval.words import Query, Vocabulary

pc: Any = pyarrow.compute  # whose functions are made when it is imported
K1, B = 1.2, 0.75  # of BM25, Lucene's values
# Rounding the query and the result to half precision moves a cosine by at most 2^-11 each; two cosines by twice that. And twice that.
SLACK = 2.0**-8

TIED = 10  # times the wanted rows are ranked at most, where many tie for the last place

Order = list[tuple[str, float]]


def cosines(vectors: Float[np.ndarray, "n D"], query: Vector) -> Float[np.ndarray, " n"]:
    """In double precision, row by row, then rounded: the same number whichever rows are compared with it."""
    return (vectors.astype(np.float64) * query.astype(np.float64)).sum(1).clip(-1, 1).astype(np.float32)


def best(ids: Sequence[str], scores: Sequence[float], depth: int) -> Order:
    """The `depth` best, equal ones in the order of ids, and those that tie with the last: which is in must not hang on its hash."""
    order = sorted(zip(ids, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
    end = depth
    while end < min(len(order), TIED * depth) and order[end][1] == order[depth - 1][1]:
        end += 1
    return order[:end]


@cache
def _workers() -> ThreadPoolExecutor:
    """Threads that compute on one core each, one for each kind of evidence.

    torch would share every pass among all cores and wait for the slowest: where another program keeps one of them busy, a pass of 0.03 ms takes 8.
    """
    return ThreadPoolExecutor(len(SPACES) + 1, "index", initializer=_on_one_core, initargs=(torch.get_num_threads(),))


def _on_one_core(others: int) -> None:
    """others: what torch's setting was; it is both this thread's and the default of threads that have not computed yet, which get it back."""
    torch.set_num_threads(1)
    restoring = Thread(target=torch.set_num_threads, args=(others,))
    restoring.start()
    restoring.join()


class _Vectors(NamedTuple):
    places: Int[np.ndarray, " n"]
    values: Float[np.ndarray, "n D"]


class _Values:
    """A column of few different texts."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        coded = pc.fill_null(column, "").combine_chunks().dictionary_encode()
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        self._codes = {text: code for code, text in enumerate(coded.dictionary.to_pylist())}
        self._rows = np.asarray(coded.indices)

    def among(self, texts: Sequence[str]) -> Bool[np.ndarray, " N"]:
        """The rows that have one of the texts."""
        wanted = np.zeros(len(self._codes) + 1, bool)
        wanted[[self._codes[text] for text in texts if text in self._codes]] = True
        return wanted[self._rows]


class _Texts:
    """Texts to be searched for pieces of them: one run of bytes, in which `bytes.find` is many times faster than a search of each."""

    def __init__(self, texts: Sequence[str]) -> None:
        """texts: folded, which leaves no line break in them."""
        lines = [text.encode() + b"\n" for text in texts]
        self._bytes = b"".join(lines)
        self._starts = [0, *accumulate(map(len, lines))]

    def having(self, piece: str) -> Bool[np.ndarray, " N"]:
        """Which texts have the piece in them."""
        which, wanted = np.zeros(len(self._starts) - 1, bool), piece.encode()
        at = self._bytes.find(wanted)
        while at >= 0:
            row = bisect_right(self._starts, at) - 1
            which[row] = True
            at = self._bytes.find(wanted, self._starts[row + 1])
        return which


def columns(fields: pa.Schema) -> list[str]:
    """What a search needs of the table."""
    return ["id", *FILTERED, "folded", "tokens", *(f"{space}_vec" for space in sizes(fields))]


class Exact:
    """A snapshot of the index's table, in the order of ids."""

    def __init__(self, table: pa.Table) -> None:
        table = table.take(pc.sort_indices(table.column("id"))) if table.num_rows else table
        self.ids: list[str] = table.column("id").to_pylist()
        self._columns = {name: _Values(table.column(name)) for name in FILTERED}
        self._texts = _Texts(table.column("folded").to_pylist())
        self._vectors = {space: _Vectors(*matrix(table, space)) for space in sizes(table.schema)}
        self._postings = Postings(table.column("tokens"))

    @property
    def vocabulary(self) -> Vocabulary:
        return self._postings.vocabulary

    def vectors(self, space: Space) -> tuple[list[str], Float[np.ndarray, "n D"]]:
        """Every vector of a space, with the ids of its rows."""
        if space not in self._vectors:
            return [], np.zeros((0, 0), np.float32)
        places, values = self._vectors[space]
        return [self.ids[place] for place in places], values.astype(np.float32)

    def search(
        self, vectors: Mapping[Space, Vector], query: Query, where: Filter, depth: int
    ) -> dict[Evidence, Order]:
        """The best `depth` rows by each evidence, among those that the filter and every phrase allow."""
        allowed = self._allowed(where, query)
        waiting: dict[Evidence, Future[Order]] = {
            space: _workers().submit(self._nearest, space, vector, allowed, depth) for space, vector in vectors.items()
        }
        if query:
            waiting["words"] = _workers().submit(self._matching, query, allowed, depth)
        return {evidence: order.result() for evidence, order in waiting.items()}

    def _allowed(self, where: Filter, query: Query) -> Bool[np.ndarray, " N"] | None:
        """The rows that the filter and every phrase allow; None where all are."""
        parts = [column.among(where.wanted()[name]) for name, column in self._columns.items() if name in where.wanted()]
        parts += [self._texts.having(phrase) for phrase in query.phrases]
        return np.logical_and.reduce(parts) if parts else None

    def _nearest(self, space: Space, vector: Vector, allowed: Bool[np.ndarray, " N"] | None, depth: int) -> Order:
        if space not in self._vectors:
            return []
        places, values = self._vectors[space]
        usable = None if allowed is None else allowed[places]
        if (len(places) if usable is None else np.count_nonzero(usable)) > depth:
            rough = torch.mv(torch.from_numpy(values), torch.from_numpy(vector.astype(np.float16))).float()
            if usable is not None:
                rough[torch.from_numpy(~usable)] = -torch.inf
            candidates = (rough >= rough.topk(depth).values[-1] - SLACK).nonzero()[:, 0].numpy()
        else:
            candidates = np.arange(len(places)) if usable is None else np.flatnonzero(usable)
        return self._best(places[candidates], cosines(values[candidates], vector), depth)

    def _matching(self, query: Query, allowed: Bool[np.ndarray, " N"] | None, depth: int) -> Order:
        scores = self._postings.scores(query.terms)
        if allowed is not None:
            scores[~allowed] = -1
        enough = 0 if query.phrases else np.finfo(np.float32).tiny  # with phrases, rows that have those but none of the words are hits too
        if len(scores) > depth:
            enough = max(enough, torch.from_numpy(scores).topk(depth).values[-1].item())
        places = np.flatnonzero(scores >= enough)
        return self._best(places, scores[places], depth)

    def _best(self, places: Int[np.ndarray, " n"], scores: Float[np.ndarray, " n"], depth: int) -> Order:
        order = np.lexsort((places, -scores))[: TIED * depth]  # by score, then by id, which is the order of places
        return best([self.ids[place] for place in places[order]], scores[order].tolist(), depth)


class Postings:
    """Which rows each word is in, how often, and BM25 by it (Robertson and Zaragoza 2009, with Lucene's idf)."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        """column: each row's tokens, joined by spaces."""
        lists = pc.split_pattern(column, " ").combine_chunks()
        lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
        rows, flat = pc.list_parent_indices(lists), lists.flatten()
        real = pc.not_equal(flat, "")  # what an empty text is split into
        rows, coded = np.asarray(rows.filter(real)).astype(np.int64), flat.filter(real).dictionary_encode()
        words = coded.dictionary.to_pylist()
        order = sorted(range(len(words)), key=words.__getitem__)
        rank = np.empty(len(words), np.int64)
        rank[order] = np.arange(len(words))
        count = max(len(column), 1)
        keys, repeats = np.unique(rank[np.asarray(coded.indices)] * count + rows, return_counts=True)
        self._rows, self._repeats = keys % count, repeats.astype(np.float64)
        self._starts = np.searchsorted(keys, np.arange(len(words) + 1) * count)
        lengths = np.bincount(rows, minlength=len(column)).astype(np.float64)
        self._worded = int((lengths > 0).sum())  # rows without words do not count, as in LanceDB
        self._norms = K1 * (1 - B + B * lengths / max(lengths.sum() / max(self._worded, 1), 1e-9))
        self.vocabulary = Vocabulary([words[place] for place in order], np.diff(self._starts).tolist())

    def scores(self, terms: tuple[str, ...]) -> Float[np.ndarray, " N"]:
        """BM25 of every row, 0 where it has none of the terms."""
        total = np.zeros(len(self._norms))
        for term in terms:
            if (place := self.vocabulary.places.get(term)) is not None:
                span = slice(self._starts[place], self._starts[place + 1])
                rows, repeats = self._rows[span], self._repeats[span]
                idf = np.log1p((self._worded - len(rows) + 0.5) / (len(rows) + 0.5))
                total[rows] += idf * repeats * (K1 + 1) / (repeats + self._norms[rows])
        return total.astype(np.float32)
