"""Bad inputs through their readers in processes that may be killed, and what came of each."""

import json
import os
import select
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SILENCE = 90  # seconds without a word after which a process is killed: it waits for something, or the machine is very busy
FIRST = 300  # until its first word, when everything is imported


class Trouble(NamedTuple):
    """An input that was not treated as it must be. why: a traceback, or a sentence."""

    index: int
    reader: str
    name: str
    outcome: str
    why: str


@dataclass
class Tally:
    """What came of the inputs: by reader the number of each outcome, what was wrong, and the worst of time and memory."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    troubles: list[Trouble] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    grown: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def inputs(self) -> int:
        return sum(counter.total() for counter in self.counts.values())

    def add(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        reader = before["reader"]
        self.counts[reader][after["outcome"]] += 1
        self.seconds[reader] = max(self.seconds[reader], after.get("seconds", 0.0))
        self.grown[reader] = max(self.grown[reader], after.get("grown", 0))
        if after["outcome"] not in ("accepted", "refused"):
            self.troubles.append(Trouble(before["index"], reader, before["name"], after["outcome"], after["why"]))

    def table(self) -> str:
        """A line a reader."""
        lines = [f"{'reader':<12}{'inputs':>10}{'refused':>10}{'accepted':>10}{'unexpected':>12}{'slowest':>10}{'memory':>10}"]
        for reader, counter in sorted(self.counts.items()):
            wrong = counter.total() - counter["refused"] - counter["accepted"]
            lines.append(f"{reader:<12}{counter.total():>10}{counter['refused']:>10}{counter['accepted']:>10}{wrong:>12}"
                         f"{self.seconds[reader]:>8.2f} s{self.grown[reader] / 2**20:>6.0f} MiB")  # fmt: skip
        return "\n".join([*lines, f"{'in all':<12}{self.inputs:>10}{'':>20}{len(self.troubles):>12}"])


def corpus(start: int, stop: int, every: int = 1) -> Tally:
    """Those inputs of the corpus, or one of `every` that many."""
    tally = Tally()
    while start < stop:
        last, died = _some(tally, {"seed": None, "start": start, "stop": stop, "every": every})
        start = last + every if died else stop
    return tally


def fuzz(seed: int, seconds: float, tally: Tally | None = None, readers: Sequence[str] = ()) -> Tally:
    """Mutations of good inputs for that long. readers: of these alone."""
    tally, until, start = tally or Tally(), time.time() + seconds, 0
    while time.time() < until:
        last, _ = _some(tally, {"seed": seed, "start": start, "stop": None, "until": until, "readers": list(readers)})
        start = last + 1
    return tally


def _some(tally: Tally, plan: dict[str, Any]) -> tuple[int, bool]:
    """One process, until its end or its death: the number of its last input, and whether that was its death."""
    last, pending = plan["start"] - 1, None
    for row in _rows(plan):
        if "outcome" in row:
            tally.add(pending or row, row)
            last, pending = row["index"], None
        else:
            last, pending = row["index"], row
    if pending is not None:
        tally.add(pending, {"outcome": "died or hung", "why": f"the process said nothing more within {SILENCE} s, or was killed"})
    elif last < plan["start"]:
        raise RuntimeError("the process of the readers did not start, or not in time: run python -m tests.hostile --replay by itself")
    return last, pending is not None


def _rows(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "tests.hostile.worker", json.dumps(plan)], stdout=subprocess.PIPE, env=environment,
                               stdin=subprocess.DEVNULL, cwd=ROOT)  # fmt: skip
    assert process.stdout is not None
    buffer, patience = b"", FIRST
    try:
        while select.select([process.stdout], [], [], patience)[0]:
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                break
            *lines, buffer = (buffer + part).split(b"\n")
            patience = SILENCE
            yield from map(json.loads, lines)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def kept(trouble: Trouble, content: bytes, suffix: str, folder: Path) -> Path:
    """The input of a trouble in a file whose name says which reader is to read it again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{trouble.reader}-{trouble.name.replace(', ', '-').replace(' ', '')}{suffix}"
    path.write_bytes(content)
    return path


def summary(troubles: Sequence[Trouble], most: int = 10) -> str:
    """The first of what was wrong, for people."""
    lines = [f"{trouble.reader}: {trouble.name}: {trouble.outcome}: {trouble.why}" for trouble in troubles[:most]]
    return "\n".join([f"{len(troubles)} inputs were not treated as they must be", *lines])
