"""Search through LanceDB's own indices: for tables that are too large to be held in memory.

The same evidence as `exact.py` gives, found by inverted-file vector indices and an inverted word index. Each evidence is a query of its own:
LanceDB's hybrid queries have turned a filter that is to be applied before the search into one applied after it (lancedb 3095).
Vectors are compared again in double precision, so that a hit has the same score whichever engine found it. BM25 agrees with
`exact.py` once `Index.optimise` has run: LanceDB scores rows that it has not indexed yet by statistics of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.exact import TIED, Order, best, cosines
from retrieval.rows import Evidence, Filter, Space, Vector
from retrieval.schema import matrix, sizes
from retrieval.words import Query

if TYPE_CHECKING:
    from lancedb.table import Table

SPARE = 2  # times as many neighbours are fetched as are wanted: their order is settled here
PARTITION_ROWS = 4096  # of a vector index; smaller partitions lose more neighbours at the same share probed
PROBED = 0.5  # share of the partitions that a query visits
MATCH_ALL = "true"


def search(table: Table, vectors: Mapping[Space, Vector], query: Query, where: Filter, depth: int) -> dict[Evidence, Order]:
    """The best `depth` rows by each evidence, among those that the filter and every phrase allow."""
    condition = allowed(where, query)
    held = sizes(table.schema)
    orders: dict[Evidence, Order] = {
        space: _nearest(table, space, vector, condition, depth) if space in held else [] for space, vector in vectors.items()
    }
    if query:
        orders["words"] = _matching(table, query, condition, depth)
    return orders


def allowed(where: Filter, query: Query) -> str:
    """SQL: the rows that the filter and every phrase allow."""
    phrases = ["contains(folded, '{}')".format(phrase.replace("'", "''")) for phrase in query.phrases]
    return " AND ".join(filter(None, [where.sql(), *phrases])) or MATCH_ALL


def _nearest(table: Table, space: Space, vector: Vector, condition: str, depth: int) -> Order:
    column = f"{space}_vec"
    search: Any = table.search(vector.astype(np.float32), vector_column_name=column, query_type="vector")
    search = search.distance_type("dot").where(condition, prefilter=True).nprobes(probes(table.count_rows()))
    hits = search.limit(SPARE * depth).select(["id", column, "_distance"]).to_arrow()
    return best(hits.column("id").to_pylist(), cosines(matrix(hits, space)[1], vector).tolist(), depth)


def probes(rows: int) -> int:
    return max(1, round(PROBED * partitions(rows)))


def partitions(rows: int) -> int:
    return max(1, rows // PARTITION_ROWS)


def _matching(table: Table, query: Query, condition: str, depth: int) -> Order:
    scores: dict[str, float] = {}
    if query.terms:
        search = table.search(" ".join(query.terms), query_type="fts", fts_columns="tokens").where(condition, prefilter=True)
        hits = search.limit(TIED * depth).select(["id", "_score"]).to_arrow()
        scores = dict(zip(hits.column("id").to_pylist(), hits.column("_score").to_pylist(), strict=True))
    if query.phrases and len(scores) < depth:  # a phrase may begin or end inside a word: such rows have it, but none of its tokens
        for row in table.search().where(condition).select(["id"]).to_arrow().column("id").to_pylist():
            scores.setdefault(row, 0.0)
    return best(list(scores), list(scores.values()), depth)
