"""The catalogue's file: SQLite with its tables, migrations, and what happens when it is damaged, newer, busy, or the disk is full.

A connection is opened for each use and closed after it, so that threads and processes share the file and nothing else. All in it can be made
again from the LoRA files: a damaged one is set aside and begun anew.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from composition.refusal import Refused

BUSY = 30.0  # seconds to wait for another process that writes
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_FORMAT)
_FILES = """
CREATE TABLE files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, beside TEXT NOT NULL,
    settled INTEGER NOT NULL, whole INTEGER NOT NULL, tensors INTEGER NOT NULL, alias TEXT NOT NULL, sha256 TEXT NOT NULL, tensor_sha256 TEXT NOT NULL, data_sha256 TEXT NOT NULL, family TEXT NOT NULL, trouble TEXT NOT NULL,
    card TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX files_alias ON files (alias) WHERE alias != '';
CREATE INDEX files_sha256 ON files (sha256) WHERE sha256 != '';
CREATE INDEX files_tensors ON files (tensor_sha256) WHERE tensor_sha256 != '';
CREATE INDEX files_data ON files (data_sha256) WHERE data_sha256 != '';
CREATE TABLE contents (
    identity BLOB PRIMARY KEY, content TEXT NOT NULL
) WITHOUT ROWID;
"""
MIGRATIONS: Sequence[str | Callable[[sqlite3.Connection], None]] = (_FILES,)  # from version 0, 1, ... to the next


class Damaged(sqlite3.DatabaseError):
    """A file whose pages SQLite can open and does not find in order."""


class Store:
    """A catalogue's file. on_trouble hears of a file that was set aside, in a sentence."""

    def __init__(self, file: Path, on_trouble: Callable[[str], None] | None = None) -> None:
        self.file = Path(file)
        self._on_trouble = on_trouble or (lambda sentence: None)

    @contextmanager
    def opened(self, *, create: bool = True, check: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection to a file of the present version; without `create`, Refused where there is none.

        check: the whole file is read over first, a few milliseconds a megabyte, so that damage is seen before anything is written.
        Raises Refused for a file that a newer Medley wrote, that is busy for long, or that cannot be written.
        """
        if not create and not self.file.is_file():
            raise Refused(f"there is no catalogue yet ({self.file.name}): make one with medley index FOLDER")
        before = self._identity()
        try:
            db = self._current(check)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if not _damaged(error):
                raise self._refused(error) from None
            self._set_aside(error, before)
            try:
                db = self._current()
            except sqlite3.Error as again:
                raise self._refused(again) from None
        except OSError as error:
            raise Refused(f"the catalogue {self.file} cannot be made: {error.strerror}") from None
        opened = self._identity()
        with closing(db):
            try:
                yield db
            except (sqlite3.Error, UnicodeDecodeError) as error:
                with contextlib.suppress(sqlite3.Error):
                    db.rollback()
                if _damaged(error):
                    db.close()
                    self._set_aside(error, opened)
                    raise Refused(f"the catalogue {self.file} was damaged and has been set aside: run the same again, and it is made anew") from None
                raise self._refused(error) from None

    @contextmanager
    def writing(self, db: sqlite3.Connection) -> Iterator[None]:
        """What happens inside is written whole or not at all; another process that writes is waited for."""
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.rollback()
            raise
        db.commit()

    def _current(self, check: bool = False) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.file, timeout=BUSY, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            if check and db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise Damaged("its pages do not belong together")
            if _version(db) != len(MIGRATIONS):
                self._migrate(db)
        except BaseException:
            db.close()
            raise
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        with self.writing(db):  # other processes wait, and then find it done
            version = _version(db)
            if version > len(MIGRATIONS):
                raise Refused(f"the catalogue {self.file} was written by a newer Medley (version {version}; this one reads {len(MIGRATIONS)}): "
                              "update Medley, or delete the file to have it made again")
            for step in MIGRATIONS[version:]:
                if callable(step):
                    step(db)
                else:
                    for statement in filter(str.strip, step.split(";")):
                        db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _identity(self) -> tuple[int, int]:
        try:
            status = os.stat(self.file)
        except OSError:
            return 0, 0
        return status.st_dev, status.st_ino

    def _set_aside(self, error: Exception, damaged: tuple[int, int]) -> None:
        """Rename a damaged file and its journal, so that whoever wants to can look at it; not the new one that another process has put there."""
        if self._identity() != damaged:
            return
        aside = self.file.with_name(f"{self.file.name}.damaged-{time.time_ns():x}")
        for ending in ("", "-journal", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.replace(f"{self.file}{ending}", f"{aside}{ending}")
        self._on_trouble(f"the catalogue {self.file} is damaged ({error}): it was renamed to {aside.name} and is made anew")

    def _refused(self, error: Exception) -> Refused:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Refused(f"the catalogue {self.file} is in use by another process for over {BUSY:.0f} seconds: wait for its end and try again")
        if code == sqlite3.SQLITE_FULL:
            return Refused(f"the disk is full, so the catalogue {self.file} could not be written: make room and run the same again")
        return Refused(f"the catalogue {self.file} cannot be used ({error}): check that its folder can be written, or set MEDLEY_HOME to another")


def _version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def _damaged(error: Exception) -> bool:
    """Whether the file is at fault: bytes that lie about a length are "too big", and a schema that reads as another lacks what is asked for."""
    return (isinstance(error, Damaged | UnicodeDecodeError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE
            or any(words in str(error) for words in ("no such table", "no such column", "Could not decode")))
