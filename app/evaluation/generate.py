"""The pictures of an evaluation: those that a manifest brings, and those that a batch makes, or finds made, for the other rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from app.evaluation.cases import Problem
from app.evaluation.variants import Row
from app.workbench import run_batch
from composition import Request

if TYPE_CHECKING:
    from composition import Engine


@dataclass(frozen=True)
class Picture:
    """A picture that is there: the row it answers, where it is, what it cost (None: not known).

    request: settled, None of a picture that came with the manifest. order: how the order of its LoRAs was settled, "" for no word.
    """

    row: Row
    path: Path
    id: str
    request: Request | None = None
    seconds: float | None = None
    evaluations: int | None = None
    order: str = ""


def supplied(rows: Sequence[Row]) -> dict[int, Picture]:
    """Index to the picture of every row that came with one."""
    return {index: Picture(row, row.picture, f"supplied-{index}") for index, row in enumerate(rows) if row.picture}


def generate(engine: "Engine", rows: Sequence[Row], folder: Path, title: str, console: Console) -> tuple[list[Picture], list[Problem]]:
    """All rows' pictures in their order, and why some have none. Raises Cancelled after Ctrl-C."""
    pictures, problems = supplied(rows), []
    requested = [(index, row.request) for index, row in enumerate(rows) if row.request]
    for item in run_batch(engine, [request for _, request in requested], folder, title, console):
        index = requested[item.index][0]
        if item.path is None:
            problems.append(_problem(rows[index], item.error))
        else:
            pictures[index] = Picture(rows[index], item.path, item.id, item.request, item.seconds, item.evaluations, item.order)
    return [pictures[index] for index in sorted(pictures)], problems


def _problem(row: Row, why: str) -> Problem:
    return Problem(f"{row.variant} of {row.case.group}", why if not row.case.line else f"{row.variant}: {why}", row.case.line)
