"""Files that are written whole or not at all.

The content goes into a file of another name beside the target, onto the disk, and gets the target's name in one stroke: whoever looks,
and whatever stops the writer, sees the old file, the new one, or none.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

Content = bytes | str | Callable[[BinaryIO], object]  # text is UTF-8, half a surrogate is written as \udc80; a function writes into the file
LONG = 3600.0  # seconds
_PART = re.compile(r"\.[0-9a-f]{16}(\.\w+)?\.tmp")


def write(target: Path, content: Content) -> Path:
    """Write the file, over what has its name. Its folder must be there."""
    with _part(target, content) as part:
        os.replace(part, target)
    return target


def write_new(targets: Iterable[Path], content: Content) -> Path:
    """Write the file under the first of these names that is free, never over another file; all lie in one folder.

    Raises FileExistsError when every name is taken.
    """
    names = iter(targets)
    target = next(names)
    with _part(target, content) as part:
        while True:
            try:
                return _link(part, target)
            except FileExistsError:
                following = next(names, None)
                if following is None:
                    raise
                target = following


def sweep(folder: Path, *, shared: bool = False) -> None:
    """Remove the unfinished files that killed writers left in a folder.

    shared: somebody else may write to it, so that only files go that nobody has written to for long.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if _PART.fullmatch(path.name) and not (shared and _young(path)):
            path.unlink(missing_ok=True)


def _young(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < LONG
    except FileNotFoundError:
        return True


@contextmanager
def _part(target: Path, content: Content) -> Iterator[Path]:
    """The content in a file of its own beside the target, on the disk; removed at the end unless it was renamed."""
    part = target.parent / f".{secrets.token_hex(8)}{target.suffix}.tmp"
    try:
        with part.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        yield part
    except OSError as error:
        if error.filename in (None, str(part)):  # whoever reads it knows the file by its own name
            error.filename = str(target)
        raise
    finally:
        part.unlink(missing_ok=True)


def _link(part: Path, target: Path) -> Path:
    """Give a finished file its name in one stroke. Raises FileExistsError when the name is taken."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(part, target)
    return target
