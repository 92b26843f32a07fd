"""An append-only log: a file with one JSON object a line, that any stop leaves readable.

A line is written in one piece and is on the disk before `append` returns. What a kill cut short stays as a line of its own, which
readers skip and count.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BLOCK = 2**16  # bytes that are read at a time from the end


class Log:
    """The log in a file, which need not be there yet. damaged: how many lines the last `rows` could not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line. Raises OSError when not all of it could be written; what was written does no harm to the next line."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate, as in a bad file name
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if _torn(handle):
                line = b"\n" + line
            if os.write(handle, line) < len(line):  # one write, so that two programs never mix their lines
                raise OSError(errno.ENOSPC, "the disk took only a part of a line", str(self.path))
            os.fsync(handle)
        finally:
            os.close(handle)

    def rows(self) -> list[dict[str, Any]]:
        """All rows in order, without lines that cannot be read."""
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        rows = [(_row(line), line) for line in lines]
        self.damaged = sum(row is None and bool(line.strip()) for row, line in rows)
        return [row for row, _ in rows if row is not None]

    def newest(self) -> Iterator[dict[str, Any]]:
        """The rows from the last to the first; of a long file only as much is read as is asked for."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            start, rest = file.seek(0, os.SEEK_END), b""
            while start > 0:
                size = min(BLOCK, start)
                start = file.seek(start - size)
                first, *lines = (file.read(size) + rest).split(b"\n")
                rest = first  # its beginning may lie in the block before
                yield from filter(None, map(_row, reversed(lines)))
            if row := _row(rest):
                yield row


def _torn(handle: int) -> bool:
    """Whether the file's last line has no end."""
    if os.fstat(handle).st_size == 0:
        return False
    os.lseek(handle, -1, os.SEEK_END)
    return os.read(handle, 1) != b"\n"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode()) if line.strip() else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
