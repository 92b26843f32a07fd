"""The index's table: its columns, its version, and rows to and from Arrow.

Version 1 held what a row says, with vectors in single precision. Version 2 adds what is searched (`tokens`, `folded`), so that both
engines search the same words, and holds vectors in half precision. Whoever changes how words are spelled raises VERSION: an older
table is then written again with the new spelling.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from composition.refusal import Refused
from retrieval.rows import SPACES, Row, Space, Vector
from retrieval.words import clean, fold, tokens

VERSION = 2
MARK = b"medley.index"  # key of the table's metadata that holds the version; what lacks it is not ours
ENCODER = b"medley.encoder"  # and of a vector column's: what makes its vectors
# What says that ids are unique. Without it two writers who add the same new id at once both add it (lance 8949).
_KEY = {b"lance-schema:unenforced-primary-key:position": b"1"}
_STRINGS = ("name", "title", "family", "category", "licence", "words")
_SEARCHED = {"tokens": lambda text: " ".join(tokens(text)), "folded": fold}
_FIELDS = [
    pa.field("id", pa.string(), nullable=False, metadata=_KEY),
    pa.field("files", pa.list_(pa.binary())),  # a path is bytes: not every one is text
    *(pa.field(name, pa.string()) for name in _STRINGS),
    pa.field("triggers", pa.list_(pa.string())),
    pa.field("strength", pa.float64()),
    pa.field("consistency", pa.float64()),
    pa.field("updated", pa.float64()),
    *(pa.field(name, pa.string()) for name in _SEARCHED),
]


def vector_field(space: Space, size: int, encoder: str = "") -> pa.Field:
    """The column of a space's vectors. encoder: the name of what makes them."""
    return pa.field(f"{space}_vec", pa.list_(pa.float16(), size), metadata={ENCODER: encoder.encode()})


def schema(sizes: dict[Space, int]) -> pa.Schema:
    """sizes: the width of every vector column there is. A column appears with the first vector of its space."""
    return pa.schema([*_FIELDS, *(vector_field(space, sizes[space]) for space in SPACES if space in sizes)], {MARK: b"%d" % VERSION})


def sizes(schema: pa.Schema) -> dict[Space, int]:
    """The width of every vector column of a table."""
    return {space: schema.field(f"{space}_vec").type.list_size for space in SPACES if f"{space}_vec" in schema.names}


def encoders(schema: pa.Schema) -> dict[Space, str]:
    """The name of what made the vectors of every vector column of a table."""
    return {space: (schema.field(f"{space}_vec").metadata or {}).get(ENCODER, b"").decode() for space in sizes(schema)}


def version(schema: pa.Schema) -> int | None:
    """The version that a table states, None when it is no index of ours."""
    mark = (schema.metadata or {}).get(MARK, b"")
    return int(mark) if mark.isdigit() else None


def to_arrow(rows: Sequence[Row], sizes: dict[Space, int]) -> pa.Table:
    """The rows as the table holds them."""
    words = [clean(row.words) for row in rows]
    columns: dict[str, pa.Array] = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "files": pa.array([[os.fsencode(path) for path in row.files] for row in rows], pa.list_(pa.binary())),
        "triggers": pa.array([[clean(word) for word in row.triggers] for row in rows], pa.list_(pa.string())),
        **{name: pa.array([clean(getattr(row, name)) for row in rows], pa.string()) for name in _STRINGS},
        **{name: pa.array([getattr(row, name) for row in rows], pa.float64()) for name in ("strength", "consistency", "updated")},
        **{name: pa.array(list(map(spell, words)), pa.string()) for name, spell in _SEARCHED.items()},
        **{f"{space}_vec": _vectors([getattr(row, space) for row in rows], size) for space, size in sizes.items()},
    }
    layout = schema(sizes)
    return pa.table([columns[name] for name in layout.names], schema=layout)


def _vectors(vectors: Sequence[Vector | None], size: int) -> pa.FixedSizeListArray:
    missing = np.array([vector is None for vector in vectors], bool)
    values = np.zeros((len(vectors), size), np.float16)
    for place, vector in enumerate(vectors):
        if vector is not None:
            values[place] = vector
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size, mask=pa.array(missing))


def from_arrow(table: pa.Table) -> list[Row]:
    """The rows of a table."""
    plain = [name for name in table.column_names if name in Row.__dataclass_fields__]
    spaces = {space: _listed(table, space) for space in sizes(table.schema)}
    rows = []
    for place, values in enumerate(table.select(plain).to_pylist()):
        known: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        known["files"] = tuple(map(os.fsdecode, known.get("files", ())))
        known["triggers"] = tuple(known.get("triggers", ()))
        known.update((space, vectors[place]) for space, vectors in spaces.items())
        rows.append(Row(**known))
    return rows


def _listed(table: pa.Table, space: Space) -> list[Vector | None]:
    places, values = matrix(table, space)
    vectors: list[Vector | None] = [None] * table.num_rows
    for place, vector in zip(places, values.astype(np.float32), strict=True):
        vectors[place] = vector
    return vectors


def matrix(table: pa.Table, space: Space) -> tuple[np.ndarray, np.ndarray]:
    """(places, vectors) of the rows that have a vector of that space: (n,) and (n, D) in the table's precision."""
    column = table.column(f"{space}_vec").combine_chunks()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    places = np.flatnonzero(np.concatenate([np.asarray(chunk.is_valid()) for chunk in chunks] or [np.zeros(0, bool)]))
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]  # flatten leaves missing lists out
    values = np.concatenate(parts) if parts else np.zeros(0, np.float16)
    return places, values.reshape(len(places), column.type.list_size)


def outdated(fields: pa.Schema, place: str) -> bool:
    """Whether a table is an older version's. Raises Refused for a newer version's, and for what is no index of ours."""
    stated = version(fields)
    if stated is None:
        raise Refused(f"The table at {place} is not an index of Medley: give another place, or rebuild the index there")
    if stated > VERSION:
        raise Refused(f"The index at {place} is of a newer Medley (version {stated}, this one reads {VERSION}): update Medley or rebuild the index")
    if stated == VERSION and (missing := [field.name for field in _FIELDS if field.name not in fields.names]):
        raise Refused(f"The index at {place} lacks the columns {', '.join(missing)}: rebuild it")
    return stated < VERSION


def migrated(table: pa.Table) -> pa.Table:
    """An older version's table as the present one has it."""
    return to_arrow(from_arrow(table), sizes(table.schema))
