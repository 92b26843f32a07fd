"""The pictures of a folder that Medley made, newest first, as its manifest lists them: found by LoRA, method and star, starred, deleted."""

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from composition import atomic, untrusted
from composition.log import Log
from composition.record import MANIFEST

STARS = "stars.json"  # in the folder: names of pictures
MOST = 2_000  # lines of a manifest that are looked at
_lock = Lock()


@dataclass(frozen=True)
class Kept:
    """One picture that is there."""

    path: Path
    prompt: str
    method: str
    loras: tuple[str, ...]
    seed: int
    starred: bool


def pictures(folder: Path) -> Iterator[Kept]:
    """All that are there, newest first; a manifest of others chooses no file outside its folder."""
    starred, seen = stars(folder), set[str]()
    for number, row in enumerate(Log(folder / MANIFEST).newest()):
        name = row.get("file_name")
        if number >= MOST or not isinstance(name, str) or name in seen or Path(name).name != name or not name.endswith(".png"):
            continue
        seen.add(name)
        if is_file(folder / name):
            loras = row.get("loras")
            yield Kept(folder / name, str(row.get("text", "")), str(row.get("method", "")), tuple(map(str, loras)) if isinstance(loras, list) else (),
                       row["seed"] if isinstance(row.get("seed"), int) else 0, name in starred)


def is_file(path: Path) -> bool:
    """Whether a plain file is there, and no link or pipe."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def stars(folder: Path) -> set[str]:
    """The names of starred pictures; none where the file cannot be read."""
    try:
        names: Any = untrusted.parse_file(folder / STARS)
    except untrusted.Unreadable:
        return set()
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def star(path: Path, on: bool) -> None:
    """Star a picture, or take its star away."""
    with _lock:
        names = stars(path.parent) | {path.name} if on else stars(path.parent) - {path.name}
        atomic.write(path.parent / STARS, json.dumps(sorted(names)).encode())


def delete(path: Path) -> None:
    """Take a picture's file away. Its line in the manifest stays, as a log's lines do."""
    if is_file(path):
        path.unlink()
    star(path, False)
