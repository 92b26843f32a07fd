"""The process that reads bad input: one input after the other, each with an alarm and a limit of memory, a line before and after each.

Started by `run`, which kills it when it says nothing for too long. Its arguments are a JSON object.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from composition import pictures
from composition.refusal import Refused
from tests.hostile import corpus, mutate
from tests.hostile.corpus import Case
from tests.hostile.readers import READERS

SECONDS, SECONDS_PER_MB = 2.0, 0.02  # of a processor's time
LINES_PER_MB = {"infotext": 2.0, "manifest": 12.0, "log": 4.0, "captions": 4.0}  # seconds where it may be half a million lines or pairs
TIMES = {"lora": 3, "kinds": 3, "config": 3}  # these read a file in six ways
BYTES, BYTES_PER_BYTE = 200 * 2**20, 3
PIXELS = {"picture": 16 * pictures.MAX_PIXELS, "record": 16 * pictures.MAX_PIXELS}  # more bytes: four copies of the largest picture, on its way to a mask
MAX_WORDS = 2_000  # letters of a refusal


class TooLong(BaseException):
    """The alarm: no reader catches it."""


def main() -> None:
    plan: dict[str, Any] = json.loads(sys.argv[1])
    room = _status("VmSize") + 4 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    with TemporaryDirectory() as folder, alarmed():
        for index, case in _cases(plan):
            _report(index=index, reader=case.reader, name=case.name)
            _report(index=index, **outcome(case, Path(folder) / str(index)))


@contextmanager
def alarmed() -> Iterator[None]:
    """The alarm raises TooLong, wherever a reader is."""
    before = signal.signal(signal.SIGPROF, _ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)


def _cases(plan: dict[str, Any]) -> Iterator[tuple[int, Case]]:
    if plan["seed"] is None:
        yield from list(enumerate(corpus.cases()))[plan["start"] : plan["stop"] : plan["every"]]
        return
    index = plan["start"]
    while time.time() < plan["until"]:
        yield index, mutate.case(plan["seed"], index, plan["readers"] or mutate.FUZZED)
        index += 1


def outcome(case: Case, folder: Path) -> dict[str, Any]:
    """What came of one input: "accepted", "refused", or what should not be, with why."""
    reader = READERS[case.reader]
    folder.mkdir()
    path = folder / f"0{reader.suffix}"
    if callable(case.content):
        case.content(path)
        size = 0
    else:
        path.write_bytes(case.content)
        size = len(case.content)
    most_seconds = SECONDS * TIMES.get(case.reader, 1) + size / 1e6 * LINES_PER_MB.get(case.reader, SECONDS_PER_MB)
    most_bytes = BYTES + BYTES_PER_BYTE * size + PIXELS.get(case.reader, 0)
    before = _reset()
    begun = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 4 * most_seconds)
    words = ""
    try:
        reader.read(path)
        kind, why = "accepted", "it was to be refused" if case.refused else ""
    except Refused as error:
        words = str(error)
        kind, why = "refused", _worded(words)
    except TooLong:
        kind, why = "too long", traceback.format_exc(limit=-3)
    except Exception as error:
        kind, why = "unexpected", f"{type(error).__name__}: {str(error)[:300]}\n{traceback.format_exc(limit=-4)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, grown = time.process_time() - begun, max(0, _status("VmHWM") - before)
    if kind in ("accepted", "refused"):
        if seconds > most_seconds:
            kind, why = "too long", f"{seconds:.1f} s for {size} bytes"
        elif grown > most_bytes:
            kind, why = "too large", f"{grown / 2**20:.0f} MiB for {size} bytes"
        elif why:
            kind = "unexpected"
    _clear(folder)
    return {"outcome": kind, "why": why, "words": words[:MAX_WORDS], "seconds": seconds, "grown": grown}


def _worded(words: str) -> str:
    """What is wrong with the words of a refusal, "" for nothing."""
    if not words.strip() or len(words) > MAX_WORDS:
        return f"a refusal of {len(words)} letters: {words[:100]}"
    if "memory" in words or "alloc" in words:
        return f"it asked for more memory than there is: {words[:200]}"
    return ""


def _clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    folder.rmdir()


def _ring(signum: int, frame: object) -> None:
    raise TooLong


def _reset() -> int:
    """Start the measurement of the peak of memory anew; bytes in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmHWM")
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def _report(**row: Any) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch takes its time to take itself down
