"""Folders of LoRA files: one walk over them, and whether what it saw is still so, which costs a look at each folder, not at each file.

A folder's time of change moves when a file in it comes, goes or gets another name. Links are looked at one by one: what they lead to may
change anywhere.
"""

import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from composition.loras.safetensors import ENDING
from composition.refusal import Refused

MAX_FOLDERS = 20_000  # searched below one folder: more are not a library of LoRAs but a link to a whole disk
COARSE_NS = 2_100_000_000  # a file system may tell apart only times that are this far apart (FAT: two seconds)
BELIEVED = 60.0  # seconds that a walk is believed, whatever its folders say: some file systems of others' machines date none

Stamp = tuple[int, ...]  # of a folder, () for what is none


@dataclass
class Walk:
    """rows: (the folder that was named, the file in it), each folder's in the order of their names. seen: folders and links looked at, with their stamps.

    begun_ns, ended_ns: by the clock on the wall, in whose time folders are stamped. clock: when it ended, by one that nobody sets.
    """

    rows: list[tuple[Path, Path]]
    seen: Mapping[Path, Stamp]
    begun_ns: int
    ended_ns: int
    clock: float

    def fresh(self) -> bool:
        """Whether another walk would see the same files. False, too, where that cannot be told: a folder that changed while it was looked at may
        have changed again since without another time."""
        if time.monotonic() - self.clock > BELIEVED:
            return False
        return all(_stamp(path) == stamp and not self._young(stamp) for path, stamp in self.seen.items())

    def _young(self, stamp: Stamp) -> bool:
        return any(self.begun_ns - COARSE_NS < moment < self.ended_ns + COARSE_NS for moment in stamp[2:])


def walk(places: Sequence[Path]) -> Walk:
    """Every LoRA file in these folders and below. Raises Refused for a folder with too many.

    What only has a file's name (a folder, a pipe, a link to nothing) is in it too. Links to folders are followed; a folder that several ways
    lead to is searched once, by its own path where it has one.
    """
    begun_ns = time.time_ns()
    by_folder: dict[Path, list[Path]] = {place: [] for place in places}
    links: list[tuple[Path, Path]] = []  # to folders: followed last
    searched: set[Stamp] = set()
    seen: dict[Path, Stamp] = {}
    for place in by_folder:
        links += [(place, link) for link in _walk(place, searched, seen, by_folder[place])]
    while links:
        place, link = links.pop(0)
        links += [(place, further) for further in _walk(link, searched, seen, by_folder[place])]
    rows = [(place, path) for place, paths in by_folder.items() for path in sorted(paths)]
    return Walk(rows, seen, begun_ns, time.time_ns(), time.monotonic())


def _walk(folder: Path, searched: set[Stamp], seen: dict[Path, Stamp], paths: list[Path]) -> list[Path]:
    """Add the LoRA files of a folder and of those below it to `paths`; returns the links to folders, which are not followed."""
    waiting, links = [folder], []
    while waiting:
        here = waiting.pop()
        seen[here] = stamp = _stamp(here)
        if stamp[:2] in searched or not stamp:
            continue  # by another way already; not there, no folder
        searched.add(stamp[:2])
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            continue  # not ours to read
        if len(searched) > MAX_FOLDERS:
            raise Refused(f"there are over {MAX_FOLDERS} folders in {folder}, links included: name a smaller folder of LoRAs")
        for entry in entries:
            linked, ours = entry.is_symlink(), entry.name.lower().endswith(ENDING)
            if _is_folder(entry):
                path = here / entry.name
                (links if linked else waiting).append(path)
                if ours and not _has_files(path):
                    paths.append(path)
            elif ours:
                paths.append(here / entry.name)
            if linked:
                seen.setdefault(here / entry.name, ())  # no folder; one that is one is looked at when it is followed
    return links


def _stamp(path: Path) -> Stamp:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    if not stat.S_ISDIR(status.st_mode):
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _has_files(folder: Path) -> bool:
    """Whether a folder named like a file holds one, which is then what its name is for."""
    try:
        return any(name.lower().endswith(ENDING) for name in os.listdir(folder))
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself
