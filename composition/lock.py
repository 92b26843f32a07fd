"""One process at a time in a folder: a lock file with the number of the process that has it.

The operating system holds the lock where it can and lets go of it when the process ends, however it ends. Where it cannot (some network
file systems) the file itself is the lock, and one of a process that is no more is removed.
"""

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from composition.refusal import Refused

FAR = 2**30  # the byte that Windows locks: nobody can read a locked one, and the process's number is to be read


@contextmanager
def alone(file: Path, what: str) -> Iterator[None]:
    """Hold the lock while it lasts; the file goes with it. Raises Refused when another holds it. what: who that would be, as "another
    batch is at work in pictures"."""
    held: list[FileIO] = []  # an open file that an interruption drops on the way here closes itself
    try:
        held.append(_taken(file, what))
        with suppress(OSError):  # a full disk has no room for the words, and the lock holds all the same
            held[0].truncate(0)
            held[0].write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        for handle in held:
            _let_go(handle, file)


def _taken(file: Path, what: str) -> FileIO:
    while True:
        handle, fresh = _opened(file)
        try:
            locked = _locked(handle.fileno())
            if locked and _same(handle, file) or locked is None and fresh:
                return handle
            if locked is False or locked is None and not _abandoned(file):
                raise _refused(file, what)
            if locked is None:
                file.unlink(missing_ok=True)
        except BaseException:
            handle.close()
            raise
        handle.close()  # the file went between the opening and the locking, or its process is no more


def _opened(file: Path) -> tuple[FileIO, bool]:
    """The file open for writing, and whether it is new."""
    while True:
        with suppress(FileExistsError):
            return FileIO(file, "x+"), True
        with suppress(FileNotFoundError):
            return FileIO(file, "r+"), False


def _locked(handle: int) -> bool | None:
    """True: locked now. False: somebody else has it. None: nobody can lock files here."""
    try:
        import fcntl
    except ImportError:
        return _locked_on_windows(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _locked_on_windows(handle: int) -> bool | None:
    try:
        msvcrt = importlib.import_module("msvcrt")  # of Windows alone
    except ImportError:
        return None
    os.lseek(handle, FAR, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(handle, 0, os.SEEK_SET)
    return True


def _same(handle: FileIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def _abandoned(file: Path) -> bool:
    """Whether the process in the file was one of this machine and is no more."""
    number = _holder(file)
    return bool(number) and not _lives(number)


def _refused(file: Path, what: str) -> Refused:
    number = _holder(file)
    who = f" (process {number})" if number else ""
    return Refused(f"{what}{who}: wait for its end, or choose another folder; if nothing is at work there, delete {file}")


def _holder(file: Path) -> int:
    """The number of the process in the file; 0 where there is none, or one of another machine."""
    try:
        words = file.read_text("utf-8", "replace").split()
    except OSError:
        return 0
    mine = len(words) == 4 and words[1].isdigit() and words[3] == socket.gethostname()
    return int(words[1]) if mine else 0


def _lives(number: int) -> bool:
    """Whether a process of this machine has this number; where that cannot be asked, it may."""
    if os.name == "nt":  # os.kill would end it there
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _let_go(handle: FileIO, file: Path) -> None:
    """The file goes while it is still locked, so that nobody locks one that is about to go; Windows removes no open file."""
    with suppress(OSError):
        file.unlink()
    handle.close()
    with suppress(OSError):
        if os.name == "nt":
            file.unlink()
