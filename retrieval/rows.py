"""A row of the index, what filters choose rows by, and their checks at the door."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float

from composition.refusal import Refused
from retrieval.words import clean

Space = Literal["weight", "behaviour", "text"]  # the evidence that is a vector: of the weights, of what it does, of its metadata
Evidence = Literal["weight", "behaviour", "text", "words"]  # and the full text
SPACES: tuple[Space, ...] = get_args(Space)
NORM = 1e-3  # by how much the length of a vector may differ from 1
Vector: TypeAlias = Float[np.ndarray, " D"]


@dataclass(frozen=True, eq=False)
class Row:
    """What the index knows of one LoRA, whatever its files are called. Any vector may be missing.

    id: the hash of its tensors. files: every path of it. words: the text that is searched. strength, consistency: None unmeasured.
    updated: seconds since 1970. Vectors are L2-normalised; the index keeps them in half precision (a cosine is off by less than 0.001).
    """

    id: str
    files: tuple[str, ...] = ()
    name: str = ""
    title: str = ""
    family: str = "unknown"
    category: str = ""
    licence: str = ""
    words: str = ""
    triggers: tuple[str, ...] = ()
    weight: Vector | None = None
    behaviour: Vector | None = None
    text: Vector | None = None
    strength: float | None = None
    consistency: float | None = None
    updated: float = 0.0

    def vectors(self) -> dict[Space, Vector]:
        return {space: vector for space in SPACES if (vector := getattr(self, space)) is not None}


@dataclass(frozen=True)
class Filter:
    """Which rows a search may return: every field that is given must match. Several values: any of them; none at all: no row.

    Values are compared exactly. They are data: however they are spelled, none of them becomes a part of a condition.
    """

    family: str | tuple[str, ...] | None = None
    category: str | tuple[str, ...] | None = None
    licence: str | tuple[str, ...] | None = None
    name: str | tuple[str, ...] | None = None

    def wanted(self) -> dict[str, tuple[str, ...]]:
        """The accepted values of every field that is given."""
        fields = {name: getattr(self, name) for name in FILTERED}
        return {
            name: tuple(clean(value) for value in ((values,) if isinstance(values, str) else values))
            for name, values in fields.items() if values is not None
        }

    def sql(self) -> str | None:
        """The condition on rows in SQL, None where every row may be returned."""
        return " AND ".join(among(name, values) for name, values in self.wanted().items()) or None


FILTERED = ("family", "category", "licence", "name")


def among(column: str, values: Iterable[str]) -> str:
    """SQL: the column has one of the values. The only place where text of others is written into SQL."""
    listed = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({listed})" if listed else "false"


@dataclass(frozen=True)
class Hit:
    """A row that a search returned. score: of the fused order. ranks (from 1), scores: of each evidence that ranked it.

    Scores of vectors are cosines, of words BM25. Nothing is cut off by score: that is the caller's decision.
    """

    id: str
    score: float
    ranks: Mapping[Evidence, int] = field(default_factory=dict)
    scores: Mapping[Evidence, float] = field(default_factory=dict)


def check_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows, when they may be written. Raises Refused."""
    rows, ids, sizes = list(rows), set(), {}
    for row in rows:
        if not row.id:
            raise Refused(f"The LoRA {row.name!r} has no hash: read its file whole before it is indexed")
        if clean(row.id) != row.id:
            raise Refused(f"{row.id!r} is no hash: the id of a row is the hash of its LoRA's tensors")
        if row.id in ids:
            raise Refused(f"The hash {row.id!r} is given twice: list all files of a LoRA in one row")
        ids.add(row.id)
        for space, vector in row.vectors().items():
            check_vector(vector, space, sizes.setdefault(space, len(vector)))
    return rows


def check_vector(vector: Vector, space: str, size: int | None) -> None:
    """size: what the index holds, None when it has none of them. Raises Refused for a vector that cannot be compared with those."""
    if vector.ndim != 1 or not len(vector):
        raise Refused(f"The {space} vector has the shape {vector.shape}: one row of numbers is expected")
    if size is not None and len(vector) != size:
        raise Refused(
            f"The {space} vector has {len(vector)} numbers, those of the index have {size}: they were made by another encoder. Rebuild the index"
        )
    if not np.isfinite(vector).all() or abs(np.linalg.norm(vector.astype(np.float64)) - 1) > NORM:
        raise Refused(f"The {space} vector has the length {np.linalg.norm(vector.astype(np.float64)):.4g}: divide it by its length")
