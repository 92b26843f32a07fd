"""The catalogue: cards of all LoRA files in the user's folders, kept in a file, so that each file is read once.

A scan reads the headers of what is new or has changed; whole files are read in a second pass that can stop at any time. What a pass has read
is kept by the file's size, time of change and number, so that a file that gets another name or folder is not read again. One file never takes
down the others: what cannot be used has a card that says why. Several processes may work on one catalogue.
"""

import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from composition.loras import library
from composition.loras.folders import COARSE_NS
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import NotNow, SafeFile
from composition.refusal import Cancelled, Refused
from retrieval import cards, headers, scanning
from retrieval.cards import Card
from retrieval.scanning import NOTHING, Seen, Stat
from retrieval.store import Store

BATCH = 200  # cards written at a time
FRESH_NS = 100_000_000  # a file this young is waited for: a change right after it was read could bear the same time
LEAST_DIGITS, MOST_DIGITS = 6, 64
_COLUMNS = ("path", "size", "mtime_ns", "inode", "beside", "settled", "whole", "tensors", "alias", "sha256", "tensor_sha256", "data_sha256", "family", "trouble", "card")
_PUT = f"INSERT OR REPLACE INTO files ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"


class Scan(NamedTuple):
    """What a scan saw. files: how many there are; broken: those that cannot be used; absent: folders that are not there, whose cards stay."""

    files: int
    added: int
    changed: int
    removed: int
    broken: tuple[Card, ...]
    absent: tuple[Path, ...]
    seconds: float


class Reading(NamedTuple):
    """What a pass over whole files did. size: their bytes. left: files that changed meanwhile or could not be read this time, for another pass.
    broken: those whose numbers cannot be used."""

    files: int
    size: int
    left: int
    broken: tuple[Card, ...]
    seconds: float


OnFile = Callable[[Card, int, int], None]  # the card, its number from 1, of how many
OnRead = Callable[[Card, SafeFile, Mapping[str, Factors]], None]


class Catalogue:
    """Cards in a file. on_trouble: hears, in a sentence, when it was damaged and is made anew."""

    def __init__(self, file: Path, on_trouble: Callable[[str], None] | None = None) -> None:
        self._store = Store(file, on_trouble)
        self._known: dict[tuple[object, ...], library.Known] = {}
        self._lock = threading.Lock()

    @property
    def file(self) -> Path:
        return self._store.file

    # making it -----------------------------------------------------------------------------------------------------

    def scan(self, folders: Sequence[Path], model: str = "", *, on_file: OnFile | None = None, cancel: threading.Event | None = None) -> Scan:
        """Bring the cards of these folders, and of those bundled with a model, up to date; only headers are read.

        Raises Cancelled, with what was read so far kept; Refused when the catalogue cannot be written.
        """
        begun = time.perf_counter()
        with self._store.opened(check=True) as db:
            before = {path: ((size, mtime_ns, inode), beside, settled == _mark(card)) for path, size, mtime_ns, inode, beside, settled, card in
                      db.execute("SELECT path, size, mtime_ns, inode, beside, settled, card FROM files WHERE typeof(path) = 'blob'")}  # before the walk: what others add later stays
            known = library.Known(model, scanning.absolute(folders))
            files = list(scanning.look(known))
            fresh = [seen for seen in files if before.get(os.fsencode(seen.path)) != (seen.stat, seen.beside, True)]
            self._put_all(db, self._described(db, fresh, on_file, cancel))
            present = [place for place in known.places if place.is_dir()]
            removed = self._remove(db, before, {os.fsencode(seen.path) for seen in files}, present)
            paths = {seen.path for seen in files}
            broken = tuple(card for card in self._cards(db, "WHERE trouble != ''") if card.path in paths)
        earlier = [(seen, before[path]) for seen in fresh if (path := os.fsencode(seen.path)) in before]
        changed = sum((seen.stat, seen.beside) != row[:2] for seen, row in earlier)
        return Scan(len(files), len(fresh) - len(earlier), changed, removed, broken, tuple(place for place in known.places if place not in present),
                    time.perf_counter() - begun)

    def read(
        self, folders: Sequence[Path] | None = None, *, on_file: OnFile | None = None, on_read: OnRead | None = None, again: bool = False,
        cancel: threading.Event | None = None,
    ) -> Reading:
        """Read whole the files that no pass has read: hashes, singular values. It may stop anywhere and go on later.

        folders: those in them alone. on_read: gets each file that can be used while it is in memory. again: those that were read before, too.
        Raises Cancelled and Refused as `scan`.
        """
        begun, size, left, broken = time.perf_counter(), 0, 0, []
        with self._store.opened() as db:
            rows = db.execute(f"SELECT path FROM files WHERE tensors {'' if again else 'AND NOT whole'} ORDER BY path")
            inside = None if folders is None else _inside(scanning.absolute(folders))
            paths = [path for path, in rows if inside is None or path.startswith(inside)]
            for number, path in enumerate(paths, 1):
                if cancel is not None and cancel.is_set():
                    raise Cancelled("the reading of LoRA files was stopped; what was read is kept")
                card = self._read(db, Path(os.fsdecode(path)), on_read, again)
                left += card is None
                if card is None:
                    continue
                size += card.size
                broken += [card] if card.trouble else []
                if on_file:
                    on_file(card, number, len(paths))
        return Reading(len(paths) - left, size, left, tuple(broken), time.perf_counter() - begun)

    # asking it -----------------------------------------------------------------------------------------------------

    def cards(self) -> list[Card]:
        """All, by path. Files that were deleted since the last scan are among them."""
        with self._store.opened() as db:
            return list(self._cards(db, "ORDER BY path"))

    def card(self, path: Path) -> Card | None:
        """Of this path, as of the last scan."""
        with self._store.opened() as db:
            return next(self._cards(db, "WHERE path = ?", os.fsencode(os.path.abspath(path))), None)

    def of(self, tensor_sha256: str) -> list[Card]:
        """Every file with these tensors, by path."""
        with self._store.opened() as db:
            return list(self._cards(db, "WHERE tensor_sha256 = ? AND tensor_sha256 != '' ORDER BY path", tensor_sha256))

    def by_hash(self, prefix: str) -> list[Card]:
        """The files of a hash, by its first digits or whole: of the file (sha256, AutoV2), of what follows its header (AutoV3, A1111), or of its
        tensors. Raises Refused for what is none."""
        digits = prefix.strip().lower().removeprefix("0x")
        if not LEAST_DIGITS <= len(digits) <= MOST_DIGITS or not set(digits) <= set("0123456789abcdef"):
            raise Refused(f"{prefix!r} is no hash: give {LEAST_DIGITS} to {MOST_DIGITS} hexadecimal digits, as 0A1B2C3D4E")
        kinds = ("sha256", "tensor_sha256", "data_sha256")
        rule = " OR ".join(f"({kind} >= ? AND {kind} < ? AND {kind} != '')" for kind in kinds)
        with self._store.opened() as db:
            return list(self._cards(db, f"WHERE {rule} ORDER BY path", *[digits, digits + "g"] * len(kinds)))

    def duplicates(self) -> list[list[Card]]:
        """The files of equal tensors, whatever their headers say, in groups of two or more; the largest waste first. Several names of one file on
        the disk are no duplicates of each other."""
        with self._store.opened() as db:
            groups: dict[str, list[Card]] = {}
            for card in self._cards(db, "WHERE tensor_sha256 IN (SELECT tensor_sha256 FROM files WHERE tensor_sha256 != '' GROUP BY tensor_sha256 "
                                        "HAVING COUNT(*) > 1) ORDER BY path"):
                groups.setdefault(card.tensor_sha256, []).append(card)
        copies = [(len({card.inode or card.path for card in group}) - 1, group) for group in groups.values()]
        return [group for spare, group in sorted(copies, key=lambda pair: -pair[0] * pair[1][0].size) if spare]

    def find(self, source: str, model: str, folders: Sequence[Path] = (), *, conditions: bool = False) -> Path:
        """As `library.find`, to the word; but the folders are walked only when one of them changed, and no header is read that a scan has read.

        The catalogue's file is only read; where there is none, or it cannot be used, headers are.
        """
        if path := library.direct(source):
            return path
        key = (model, tuple(map(os.path.abspath, folders)), tuple(map(os.fspath, folders)), conditions)
        with self._lock:
            known = self._known.get(key)
        if known is not None and known.walk.fresh():
            several = library.matching(source, known, conditions)
            if len(several) == 1 and os.path.lexists(several[0]):
                return several[0]  # nothing is refused by what was true a moment ago
        known = library.Known(model, folders, conditions=conditions, alias=self._aliases())
        with self._lock:
            self._known = {**dict(list(self._known.items())[-7:]), key: known}
        return library.find(source, model, folders, conditions=conditions, known=known)

    # inside --------------------------------------------------------------------------------------------------------

    def _described(
        self, db: sqlite3.Connection, files: Sequence[Seen], on_file: OnFile | None, cancel: threading.Event | None,
    ) -> Iterator[tuple[Card, Seen, bool]]:
        for number, seen in enumerate(files, 1):
            if cancel is not None and cancel.is_set():
                raise Cancelled("the scan of LoRA files was stopped; what was read is kept")
            settled = abs(time.time_ns() - seen.stat[1]) > COARSE_NS  # looked at before it is read: what changes it later shows
            card = _at(headers.describe(seen.path, seen.sidecars, seen.picture), seen.stat)
            whole = self._content(db, seen)
            card = headers.completed(card, whole) if whole and card.tensors else card
            if on_file:
                on_file(card, number, len(files))
            yield card, seen, settled

    def _put_all(self, db: sqlite3.Connection, rows: Iterable[tuple[Card, Seen, bool]]) -> None:
        """Write them as they come, some at a time; when they stop coming, those that came."""
        waiting: list[tuple[object, ...]] = []
        try:
            for card, seen, settled in rows:
                waiting.append(_row(card, seen.beside, settled, bool(card.sha256)))
                if len(waiting) >= BATCH:
                    self._flush(db, waiting)
        finally:
            self._flush(db, waiting)

    def _flush(self, db: sqlite3.Connection, rows: list[tuple[object, ...]]) -> None:
        if not rows:
            return
        with self._store.writing(db):
            db.executemany(_PUT, rows)
        rows.clear()

    def _remove(self, db: sqlite3.Connection, before: Mapping[bytes, tuple[Stat, str, int]], here: set[bytes], places: Sequence[Path]) -> int:
        """Forget the files in these folders that are gone; not one that another process has seen again since."""
        inside = _inside(places)
        gone = [(path, *stat) for path, (stat, _, _) in before.items() if path not in here and path.startswith(inside)]
        if gone:
            with self._store.writing(db):
                db.executemany("DELETE FROM files WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?", gone)
        return len(gone)

    def _read(self, db: sqlite3.Connection, path: Path, on_read: OnRead | None, again: bool) -> Card | None:
        """The card, completed and written; None for a file that is not as it was when it was scanned, or cannot be read this time."""
        card, seen = next(self._cards(db, "WHERE path = ?", os.fsencode(path)), None), scanning.at(path)
        if card is None or seen.stat != _stat(card):
            return None
        whole = None if again else self._content(db, seen)
        raw, factors = None, {}
        if whole is None:
            _wait(seen.stat)
            try:
                whole, raw, factors = headers.load(path)
            except NotNow:
                return None
            if scanning.at(path)[1:] != seen[1:]:
                return None
        described = headers.describe(path, seen.sidecars, seen.picture)
        card = headers.completed(_at(described, seen.stat), whole)
        with self._store.writing(db):
            if whole.sha256:  # what could not be read may be readable another day
                db.execute("INSERT OR REPLACE INTO contents VALUES (?, ?)", (seen.identity, whole.text()))
            db.execute(_PUT, _row(card, seen.beside, True, True))
        if on_read and raw is not None and card.usable:
            on_read(card, raw, factors)
        return card

    def _content(self, db: sqlite3.Connection, seen: Seen) -> headers.Content | None:
        """What a pass has read of the bytes of this file, wherever it was then."""
        row = db.execute("SELECT content FROM contents WHERE identity = ?", (seen.identity,)).fetchone()
        try:
            return headers.content(row[0]) if row and seen.stat != NOTHING else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _cards(self, db: sqlite3.Connection, rule: str, *values: object) -> Iterator[Card]:
        for path, text in db.execute(f"SELECT path, card FROM files {rule}", values):
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # one that cannot be read any more is no card
                yield cards.read(Path(os.fsdecode(path)), text)

    def _aliases(self) -> Callable[[Path], str]:
        """The trainer's name of a file: as of the last scan where the file is as it was then, else from its header."""
        stored: dict[bytes, tuple[int, int, str]] | None = None

        def alias(path: Path) -> str:
            nonlocal stored
            if stored is None:
                stored = {}
                with suppress(Refused), self._store.opened(create=False) as db:
                    stored = {path: (mtime_ns, size, name) for path, mtime_ns, size, name in
                              db.execute("SELECT path, mtime_ns, size, alias FROM files WHERE settled")}
            mtime_ns, size, name = stored.get(os.fsencode(os.path.abspath(path)), (-1, -1, ""))
            return name if (mtime_ns, size) == library.stamp(path) else library.trainers_name(path)

        return alias


def _at(card: Card, stat: Stat) -> Card:
    return replace(card, size=stat[0], mtime_ns=stat[1], inode=stat[2])


def _stat(card: Card) -> Stat:
    return card.size, card.mtime_ns, card.inode


def _inside(places: Sequence[Path]) -> tuple[bytes, ...]:
    """What the paths of files in these folders begin with."""
    return tuple(os.path.join(os.fsencode(place), b"") for place in places)


def _row(card: Card, beside: str, settled: bool, whole: bool) -> tuple[object, ...]:
    """settled: the file need not be looked at again while it and its card stay as they are, nor while cards have this form; one whose header cannot be
    read always is. whole: it was read whole."""
    text = card.text()
    return (os.fsencode(card.path), *_stat(card), beside, _mark(text) if settled and card.tensors else 0, int(whole), card.tensors, card.alias, card.sha256,
            card.tensor_sha256, card.data_sha256, card.family, card.trouble, text)


def _mark(text: object) -> int:
    """A checksum of a card's text in this form, never 0: a card that was damaged in the catalogue is read anew."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"), cards.FORM) or 1 if isinstance(text, str) else 0


def _wait(stat: Stat) -> None:
    """Until a file that was just written is old enough for its next change to bear another time."""
    young = FRESH_NS - abs(time.time_ns() - stat[1])
    if young > 0:
        time.sleep(young / 1e9)
