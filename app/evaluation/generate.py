"""Pictures that are missing, made; those that are there, kept. A stop at any moment loses at most the picture in work.

Each picture is `pictures/<id>.png` with its whole request inside; the id is of the request, the LoRA files' bytes, the model's
files and the libraries. `made.jsonl` has what a PNG must not: seconds. Its line is on the disk before the picture has its
name, so a picture that is there has its line.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from app.errors import sentence
from app.evaluation.cases import Problem
from app.evaluation.variants import Row
from app.workbench import Workbench, bench
from composition import Cancelled, Refused, Request, __version__, record

PICTURES, MADE = "pictures", "made.jsonl"
SMALL = 2**26  # bytes under which a model's file is known by its content
TELL = 20.0  # seconds between two lines of progress where there is no bar


@dataclass(frozen=True)
class Made:
    """A picture that is there: what it answers, where it is, what it cost (None: not known)."""

    row: Row
    path: Path
    id: str
    seconds: float | None = None
    evaluations: int | None = None
    fresh: bool = False


class Store:
    """The folder of an evaluation's pictures and the log of their making."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pictures, self.log = folder, folder / PICTURES, folder / MADE
        self.pictures.mkdir(parents=True, exist_ok=True)
        for part in self.pictures.glob(".*.png.tmp"):  # of a run that was killed
            part.unlink(missing_ok=True)
        self.known: dict[str, dict[str, Any]] = {}
        for line in self.log.read_text("utf-8").splitlines() if self.log.is_file() else ():
            try:
                row = json.loads(line)
                self.known[row["id"]] = row
            except (ValueError, KeyError, TypeError):  # the line that a kill cut short
                continue

    def path(self, name: str) -> Path:
        return self.pictures / f"{name}.png"

    def has(self, name: str) -> bool:
        return name in self.known and self.path(name).is_file()

    def note(self, row: dict[str, Any]) -> None:
        """Append a line and see it onto the disk. A line that was cut short is ended first."""
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with self.log.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.known[row["id"]] = row


class Maker:
    """An open engine that fills a store, row by row; what fails is a problem, and the next row is made."""

    def __init__(self, engine: Any, store: Store, console: Console) -> None:
        self.engine, self.store, self.console = engine, store, console
        self.problems: list[Problem] = []
        self._hashes: dict[Path, str] = {}
        self._model = _model(engine.name)

    def make(self, rows: Sequence[Row], what: str) -> list[Made]:
        """All rows' pictures, in their order; rows that fail are left out. Raises Cancelled after Ctrl-C."""
        done, wanted = {}, {}
        for index, row in enumerate(rows):
            if row.request is None:
                assert row.picture
                done[index] = Made(row, row.picture, str(index))
                continue
            try:
                wanted[index] = self.id(row.request)
            except Refused as error:
                self.problems.append(_problem(row, str(error)))
        missing = {}
        for index, name in wanted.items():
            if not self.store.has(name):
                missing.setdefault(name, rows[index])
        if missing:
            self._fill(missing, what)
        for index, name in wanted.items():
            if self.store.has(name):
                known = self.store.known[name]
                done[index] = Made(rows[index], self.store.path(name), name, known["seconds"], known["evaluations"], name in missing)
        return [done[index] for index in sorted(done)]

    def id(self, request: Request) -> str:
        """What the picture depends on, as 20 hexadecimal digits. Raises Refused for a LoRA that is not there."""
        files = [self._hash(self.engine.find(lora.source)) for lora in request.loras]
        at = [str(self.engine.device.type), str(self.engine.dtype)]
        parts = [replace(request, model=self.engine.name).json(), files, self._model, record.versions(), at]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._hashes[path]

    def _fill(self, missing: dict[str, Row], what: str) -> None:
        steps = sum(row.request.length for row in missing.values() if row.request)
        with bench(self.engine, steps, self.console) as at, self._telling(len(missing), what) as told:
            for name, row in missing.items():
                assert row.request
                try:
                    self._one(at, name, row, what)
                except Cancelled:
                    raise
                except Exception as error:  # one row's trouble is not the next one's
                    if os.environ.get("MEDLEY_DEBUG"):
                        raise
                    at.skip(row.request)
                    self.problems.append(_problem(row, sentence(error)))
                told()

    def _one(self, at: Workbench, name: str, row: Row, what: str) -> None:
        assert row.request
        result = at.run(row.request, what)
        self.store.path(name).unlink(missing_ok=True)  # one without a line: not ours to trust
        self.store.note({"id": name, "way": row.way, "group": row.case.group, "seed": row.request.seed,
                         "seconds": round(sum(result.seconds.values()), 4),
                         "evaluations": int(result.notes.get("evaluations", 0)), "medley": __version__})  # fmt: skip
        at.save(result, self.store.pictures, name)

    @contextmanager
    def _telling(self, count: int, what: str) -> Iterator[Callable[[], None]]:
        """A line now and then where there is no terminal."""
        begun = last = time.monotonic()
        done = 0

        def tell() -> None:
            nonlocal done, last
            done += 1
            now = time.monotonic()
            if not self.console.is_terminal and (now - last > TELL or done == count):
                last = now
                left = (now - begun) / done * (count - done)
                self.console.print(Text(f"{what}: {done} of {count} pictures, about {left / 60:.0f} min left"
                                        if left > 90 else f"{what}: {done} of {count} pictures"))  # fmt: skip

        yield tell


def _problem(row: Row, why: str) -> Problem:
    return Problem(f"{row.way} of {row.case.group}", why if not row.case.line else f"{row.way}: {why}", row.case.line)


def _model(name: str) -> list[Any]:
    """What tells a model's files from others of the same name: the bytes of small ones, size and time of large ones; the
    name alone for a hub id."""
    from importlib.resources import files

    bundled = Path(str(files("assets"))) / name
    place = Path(name) if Path(name).exists() else bundled if bundled.is_dir() else None
    if place is None:
        return [name]
    found = [place] if place.is_file() else sorted(path for path in (place / "sd" if place == bundled else place).rglob("*.*")
                                                  if path.is_file() and "__pycache__" not in path.parts)  # fmt: skip
    return [[path.name, _stamp(path)] for path in found]


def _stamp(path: Path) -> str:
    stat = path.stat()
    if stat.st_size < SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{stat.st_size} {stat.st_mtime_ns}"
