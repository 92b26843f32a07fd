"""The index of a library of LoRAs: one LanceDB table of vectors, words and what a filter asks for.

It is derived data: whatever happens to it, `Index.rebuild` and another reading of the library make it again. A library of up to
`exact_rows` LoRAs is searched exactly, in memory (`exact.py`); a larger one through LanceDB's indices (`indexed.py`). Both give
each evidence's order, which `fusion.py` makes one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from composition.refusal import Refused
from retrieval import indexed, place, schema
from retrieval.exact import Exact, Postings, columns
from retrieval.fusion import fuse
from retrieval.rows import SPACES, Filter, Hit, Row, Space, Vector, among, check_rows, check_vector
from retrieval.words import Query, Vocabulary, parse

if TYPE_CHECKING:
    from lancedb.table import Table

EXACT_ROWS = 200_000
DEPTH = 100  # rows that each evidence ranks, or as many as are asked for
KEPT = timedelta(minutes=10)  # how long older versions stay for readers that are still in them
BATCH = 1000  # ids in one condition
ANY = Filter()


class Index:
    """The index at a place: a folder, or object storage that LanceDB reaches. Safe for several threads, and for readers and a writer
    in processes of their own: whoever reads sees what was last written.
    """

    def __init__(
        self, uri: str | Path, *, storage: Mapping[str, str] | None = None, encoders: Mapping[Space, str] | None = None,
        exact_rows: int = EXACT_ROWS,
    ) -> None:
        """uri: a folder, or `s3://`, `gs://`, `az://`, `file://`, `memory://`. storage: LanceDB's storage options, for what its environment
        variables do not say. encoders: the name of what makes each space's vectors; vectors of others are refused.

        Makes the table where there is none, and brings an older one up to date. Raises Refused for what is damaged or no index of ours.
        """
        self.uri, self.exact_rows, self.encoders = place.address(uri), exact_rows, dict(encoders or {})
        self._lock = threading.Lock()
        self._snapshot: _Snapshot | None = None
        with place.plainly(self.uri):
            self._connection = place.connect(self.uri, storage)
            self._table = place.opened(self._connection, self.uri)

    @classmethod
    def rebuild(cls, uri: str | Path, *, storage: Mapping[str, str] | None = None, **settings: Any) -> Index:
        """An empty index in place of whatever has its name there, damaged or not. Nothing else at that place is touched."""
        place.erase(place.address(uri), storage)
        return cls(uri, storage=storage, **settings)

    def upsert(self, rows: Iterable[Row]) -> None:
        """Write rows, each in place of the one with its id: what the new row lacks (a vector) is gone. Found by the next search.

        One call is one version of the table: write in batches. Raises Refused, and then nothing was written.
        """
        rows = check_rows(rows)
        with place.plainly(self.uri):
            sizes = self._widened(rows)
            if rows:
                merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(schema.to_arrow(rows, sizes), on_bad_vectors="null")  # "bad" to LanceDB is a missing one; the rest was checked

    def _widened(self, rows: list[Row]) -> dict[Space, int]:
        """The widths of the vector columns, once each space of these rows has one."""
        fields, new = self._table.schema, {}
        sizes, encoders = schema.sizes(fields), schema.encoders(fields)
        for row in rows:
            for space, vector in row.vectors().items():
                self._check_encoder(space, encoders)
                check_vector(vector, space, sizes.get(space))
                if space not in sizes:
                    new[space] = len(vector)
        for space, size in new.items():
            try:
                self._table.add_columns(schema.vector_field(space, size, self.encoders.get(space, "")))
            except (RuntimeError, ValueError):
                self._table.checkout_latest()
                if schema.sizes(self._table.schema).get(space) != size:  # else another process was first
                    raise
        return {**sizes, **new}

    def delete(self, ids: Iterable[str]) -> None:
        """Forget rows; ids that are in no row are passed over."""
        with place.plainly(self.uri):
            for some in _batches(ids):
                self._table.delete(among("id", some))

    def get(self, ids: Iterable[str]) -> dict[str, Row]:
        """The rows of these ids, in their order, without those that are not there."""
        ids, rows = list(ids), {}
        with place.plainly(self.uri):
            for some in _batches(ids):
                table = self._table.search().where(among("id", some)).limit(len(some)).to_arrow()
                rows.update({row.id: row for row in schema.from_arrow(table)})
        return {name: rows[name] for name in dict.fromkeys(ids) if name in rows}

    def count(self, where: Filter = ANY) -> int:
        with place.plainly(self.uri):
            return self._table.count_rows(where.sql())

    def ids(self, where: Filter = ANY) -> list[str]:
        """The ids of all rows, sorted."""
        with place.plainly(self.uri):
            rows = self._table.search().select(["id"])
            return sorted(((rows.where(sql) if (sql := where.sql()) else rows).to_arrow()).column("id").to_pylist())

    def search(
        self, vectors: Mapping[Space, Vector] | None = None, text: str = "", where: Filter = ANY, k: int = 50, *, fuzzy: bool = True
    ) -> list[Hit]:
        """The k best rows by all evidence together.

        vectors: the query in each space; one that no row has a vector of finds nothing. text: words, any of which may occur, and phrases in
        double quotes, each of which must occur literally (case aside) in the words of every hit, whatever found it. where: applied
        before anything is ranked. fuzzy: a word that no row has stands for those that it begins or is a typo of: for what people
        type; a prompt's unknown words are better left alone.
        """
        vectors = dict(vectors or {})
        query = parse(text)
        with place.plainly(self.uri):
            snapshot = self._current()
            for space, vector in vectors.items():
                self._check_encoder(space, snapshot.encoders)
                check_vector(vector, space, snapshot.sizes.get(space))
            if fuzzy:
                query = Query(query.phrases, snapshot.vocabulary.close(query.terms))
            depth = max(DEPTH, k)
            if snapshot.exact:
                orders = snapshot.exact.search(vectors, query, where, depth)
            else:
                orders = indexed.search(self._table, vectors, query, where, depth)
        return fuse(orders, k)

    def vectors(self, space: Space) -> tuple[list[str], Float[np.ndarray, "n D"]]:
        """Every vector of a space with the ids of its rows: for what compares all with all, and for nulls."""
        with place.plainly(self.uri):
            snapshot = self._current()
            if snapshot.exact or space not in snapshot.sizes:
                return snapshot.exact.vectors(space) if snapshot.exact else ([], np.zeros((0, 0), np.float32))
            table = self._table.search().where(f"{space}_vec IS NOT NULL").select(["id", f"{space}_vec"]).to_arrow()
            return table.column("id").to_pylist(), schema.matrix(table, space)[1].astype(np.float32)

    def held_encoders(self) -> dict[Space, str]:
        """The name of what made the vectors of each space that has any."""
        with place.plainly(self.uri):
            return schema.encoders(self._table.schema)

    def forget(self, space: Space) -> None:
        """Drop every vector of a space: before another encoder's are written."""
        with place.plainly(self.uri):
            if space in schema.sizes(self._table.schema):
                self._table.drop_columns([f"{space}_vec"])

    def optimise(self) -> None:
        """Merge the files of many small writes, drop versions that nobody reads any more and, for a table too large for memory, bring the
        indices up to date. Searches find every row without it, and faster with it.
        """
        with place.plainly(self.uri):
            if self._table.count_rows() > self.exact_rows:
                self._build_indices()
            self._table.optimize(cleanup_older_than=KEPT)

    def _build_indices(self) -> None:
        """Those that are missing, and those of vectors made when there were less than half as many; `optimize` adds new rows to the others."""
        from lancedb.index import FTS, IvfFlat

        built = {index.columns[0]: index.name for index in self._table.list_indices()}
        if "tokens" not in built:
            self._table.create_index("tokens", config=FTS(
                base_tokenizer="whitespace", lower_case=False, stem=False, remove_stop_words=False, ascii_folding=False, max_token_length=None,
            ))  # fmt: skip
        for space in schema.sizes(self._table.schema):
            column = f"{space}_vec"
            held = self._table.count_rows(f"{column} IS NOT NULL")
            stats = self._table.index_stats(built[column]) if column in built else None
            if held and (stats is None or stats.num_indexed_rows * 2 < held):
                self._table.create_index(column, replace=True, config=IvfFlat(distance_type="dot", num_partitions=indexed.partitions(held)))

    def _current(self) -> _Snapshot:
        """What searches need to hold of the table, read again when somebody has written."""
        with self._lock:
            version = self._table.version
            if self._snapshot is None or self._snapshot.version != version:
                self._snapshot = _Snapshot(self._table, version, self._table.count_rows() <= self.exact_rows)
            return self._snapshot

    def _check_encoder(self, space: Space, held: Mapping[Space, str]) -> None:
        if space not in SPACES:
            raise Refused(f"There is no evidence {space!r}: give one of {', '.join(SPACES)}")
        ours, theirs = self.encoders.get(space), held.get(space)
        if ours is not None and theirs not in (None, ours):
            raise Refused(f"The {space} vectors of the index at {self.uri} were made by {theirs or 'an unknown encoder'}, not by {ours}: index the library again")


class _Snapshot:
    """A version of the table in memory: all of it, or only its vocabulary."""

    def __init__(self, table: Table, version: int, whole: bool) -> None:
        fields = table.schema
        self.version, self.sizes, self.encoders = version, schema.sizes(fields), schema.encoders(fields)
        self.exact = Exact(table.search().select(columns(fields)).to_arrow()) if whole else None
        self._table, self._vocabulary = table, self.exact.vocabulary if self.exact else None

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = Postings(self._table.search().select(["tokens"]).to_arrow().column("tokens")).vocabulary
        return self._vocabulary


def _batches(ids: Iterable[str]) -> Iterator[list[str]]:
    ids = iter(ids)
    while some := list(islice(ids, BATCH)):
        yield some
