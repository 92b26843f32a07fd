"""A table of the report about one question, by variant and part, with intervals: for the terminal, summary.json and the page alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.evaluation import statistics
from app.evaluation.metrics import Metric
from app.evaluation.statistics import Interval

Rows = Sequence[Mapping[str, Any]]
Cells = Mapping[str, Interval]  # a column's key to its cell


@dataclass(frozen=True)
class Section:
    """parts: names of parts of the pictures ("all", "3", "8 steps") to a row's name (a variant) to its cells."""

    key: str
    title: str
    about: str
    columns: tuple[Metric, ...]
    parts: Mapping[str, Mapping[str, Cells]]

    @staticmethod
    def of(key: str, title: str, about: str, columns: Sequence[Metric], parts: Mapping[str, Mapping[str, Cells]]) -> "Section | None":
        """Without the rows, columns and parts that have no cells; None where there are none at all."""
        filled = {part: {name: cells for name, cells in rows.items() if cells} for part, rows in parts.items()}
        filled = {part: rows for part, rows in filled.items() if rows}
        used = {column for rows in filled.values() for cells in rows.values() for column in cells}
        return Section(key, title, about, tuple(column for column in columns if column.key in used), filled) if filled else None

    def document(self) -> dict[str, Any]:
        """As summary.json has it."""
        return {"key": self.key, "title": self.title, "about": self.about, "columns": [asdict(column) for column in self.columns],
                "parts": {part: {name: {column: asdict(cell) for column, cell in cells.items()} for name, cells in rows.items()}
                          for part, rows in self.parts.items()}}  # fmt: skip


def intervals(
    rows: Rows, columns: Sequence[Metric], value: Callable[[Mapping[str, Any], Metric], float | None], **resampling: int
) -> dict[str, Interval]:
    """Each column's mean with its interval over groups, of the rows in which it has a value."""
    cells = {}
    for column in columns:
        known = [(number, row["group"]) for row in rows if (number := value(row, column)) is not None]
        if known:
            numbers, groups = zip(*known, strict=True)
            cells[column.key] = statistics.interval(numbers, groups, **resampling)
    return cells
