"""What lies in folders of LoRAs just now: each file with its state and what lies beside it, from one listing a folder."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from composition.loras import library
from composition.loras.scale import CONFIG
from retrieval import sidecars

Stat = tuple[int, int, int]  # size, mtime_ns, inode
MOST = 2**63 - 1  # the largest number that a database takes: some file systems number files by 64 bits without a sign
NOTHING: Stat = (0, 0, 0)  # of what is not there


class Seen(NamedTuple):
    """A LoRA file by its absolute path. beside: names and states of its sidecars, as text."""

    path: Path
    stat: Stat
    sidecars: tuple[Path, ...] = ()
    picture: Path | None = None
    beside: str = ""
    config: str = ""

    @property
    def identity(self) -> bytes:
        """What stands for the bytes of the file: it stays the same when the file gets another name or folder. Where a file system numbers no
        files, the path is part of it."""
        size, mtime_ns, inode = self.stat
        where = str(inode).encode() if inode else os.fsencode(self.path)
        return b"%s %d %d %s" % (where, size, mtime_ns, self.config.encode())


def absolute(places: Sequence[Path]) -> list[Path]:
    """Links in them are left: a file is known by the path that its owner sees."""
    return [Path(os.path.abspath(place)) for place in places]


def look(known: library.Known) -> Iterator[Seen]:
    """Every file of a walk over absolute folders, in its order."""
    by_folder: dict[Path, list[Path]] = {}
    for _, path in known.walk.rows:
        by_folder.setdefault(path.parent, []).append(path)
    for folder, paths in by_folder.items():
        yield from _folder(folder, paths)


def at(path: Path) -> Seen:
    """One file."""
    return next(_folder(path.parent, [path]))


def _folder(folder: Path, paths: Sequence[Path]) -> Iterator[Seen]:
    wanted = {name: "" for path in paths for name in sidecars.names(path.stem)} | {CONFIG: ""}
    try:
        with os.scandir(folder) as entries:
            stats = {entry.name: stat for entry in entries if entry.name in wanted and (stat := state(folder / entry.name)) != NOTHING}
    except OSError:
        stats = {}
    config = _written(CONFIG, stats[CONFIG]) if CONFIG in stats else ""
    for path in paths:
        names = [name for name in sidecars.names(path.stem) if name in stats]
        texts = tuple(folder / name for name in names if name.endswith(sidecars.TEXTS))
        picture = next((folder / name for name in names if name.endswith(sidecars.PICTURES)), None)
        yield Seen(path, state(path), texts, picture, "|".join([*(_written(name[len(path.stem):], stats[name]) for name in names), config]), config)


def _written(name: str, stat: Stat) -> str:
    return f"{name} {stat[0]} {stat[1]} {stat[2]}"


def state(path: Path) -> Stat:
    """Of a file, links followed; NOTHING where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return NOTHING
    return status.st_size, status.st_mtime_ns, status.st_ino & MOST
