"""The one door for files and JSON that somebody else wrote: regular files of a bounded size, JSON of a bounded size, depth and number.

What is refused raises Unreadable, whose text is the end of a sentence that begins with the thing's name ("owl.json is nested over 64
deep"): the caller names it. Time and memory are linear in the bytes, whatever the bytes are.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
MAX_TOKENS = 1_000_000  # texts, commas, colons and brackets: a file of nothing else would fill the memory with empty lists
MAX_DIGITS = 300  # of one number: none longer is a float
# Texts, signs and long numbers. Possessive, and an unclosed text ends with the whole, so that its time is linear.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},:]|[0-9]{%d,}' % (MAX_DIGITS + 1), re.DOTALL)
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_PARENTHESES = bytes.maketrans(b"[{]}", b"(())")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
SHORT = 16 * 2**20  # bytes up to which a text is looked at as a whole, in memory of its own
_ODD_LETTER = re.compile(r"[\0\ud800-\udfff]")


class Unreadable(ValueError):
    """Why something cannot be read: "is not there", "is a folder, not a file", "is not readable as JSON: ..."."""


def opened(path: Path, most: int = MAX_BYTES) -> FileIO:
    """A regular file of at most `most` bytes, unbuffered, for a `with`. A pipe or a device, which would never end, is not waited for.

    Links are followed. Raises Unreadable.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise Unreadable("is a link to a file that is not there" if os.path.islink(path) else "is not there") from None
    except IsADirectoryError:
        raise Unreadable("is a folder, not a file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a letter in the name
        raise Unreadable(f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    status = os.fstat(handle)
    trouble = ""
    if stat.S_ISDIR(status.st_mode):
        trouble = "is a folder, not a file"
    elif not stat.S_ISREG(status.st_mode):
        trouble = "is not a file but a pipe or a device"
    elif status.st_size > most:
        trouble = f"has {status.st_size:,} bytes; at most {most:,} are read"
    if trouble:
        os.close(handle)
        raise Unreadable(trouble)
    return os.fdopen(handle, "rb", buffering=0)


def read(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file. Raises Unreadable."""
    with opened(path, most) as file:
        try:
            parts, size = [], 0
            while size <= most and (part := file.read(most + 1 - size)):
                parts.append(part)
                size += len(part)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None
    if size > most:
        raise Unreadable(f"grew while it was read; at most {most:,} bytes are read")
    return b"".join(parts)


def parse(text: str | bytes, *, most: int = MAX_BYTES, odd_letters: bool = False) -> Any:
    """The value that a JSON text states.

    Raises Unreadable for what is no JSON in UTF-8, too long, too deep or of too many values, and for what readers of JSON take in
    different ways: a key given twice, NaN and infinity, numbers over MAX_DIGITS, and, without `odd_letters`, NUL and halves of
    letters, which no file name and no terminal can hold.
    """
    if len(text) > most:
        raise Unreadable(f"has {len(text):,} letters; at most {most:,} are read")
    try:
        data = text.encode() if isinstance(text, str) else text
        data = data.removeprefix(b"\xef\xbb\xbf")
        _bounded(data)
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
    except Unreadable:
        raise
    except UnicodeError as error:
        place = f" (at byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise Unreadable(f"is not UTF-8 text{place}: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is not readable as JSON: {error}") from None
    if not odd_letters and (b"\\u" in data) and any(map(_ODD_LETTER.search, _texts(value))):
        raise Unreadable("has a NUL or half a letter (a lone surrogate) in a text")
    return value


def parse_file(path: Path, *, most: int = MAX_BYTES) -> Any:
    """The value in a JSON file. Raises Unreadable."""
    return parse(read(path, most), most=most)


def _bounded(data: bytes) -> None:
    """Refuse what is too deep or has too much in it before any of it is built."""
    if len(data) <= SHORT and _plainly_bounded(data):
        return
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(data)):
        first = data[token.start()]
        if count > MAX_TOKENS:
            raise Unreadable(f"has over {MAX_TOKENS:,} texts and signs")
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise Unreadable(f"is nested over {MAX_DEPTH} deep")
        elif first in b"]}":
            depth -= 1
        elif first in b"0123456789":
            raise Unreadable(f"has a number of {token.end() - token.start():,} digits; at most {MAX_DIGITS} are read")


def _plainly_bounded(data: bytes) -> bool:
    """Whether a text is certainly within the bounds; where this cannot say, its tokens are counted one by one, which takes ten times as long."""
    if sum(map(data.count, (b'"', b"[", b"]", b"{", b"}", b",", b":"))) > MAX_TOKENS:
        return False
    rest = _TEXT.sub(b"", data)
    if _LONG_NUMBER.search(rest):
        return False
    brackets = rest.translate(None, _NO_BRACKETS).translate(_PARENTHESES)
    for _ in range(MAX_DEPTH):  # each pass takes away what is innermost
        if not brackets:
            break
        brackets = brackets.replace(b"()", b"")
    return not brackets


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Unreadable(f"has the key {twice[:80]!a} twice")
    return table


def _constant(name: str) -> Any:
    raise Unreadable(f"has {name} where a number belongs")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise Unreadable(f"has a number that is too large ({text[:40]})")
    return number


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            yield from part
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
