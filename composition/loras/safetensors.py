"""Safe reading of .safetensors files: the header alone, or all of the file in one pass.

No code in a file can run; a file that is broken, or not a safetensors file, is refused in plain words; and nothing read aliases the
file, so that replacing it meanwhile changes nothing. Everything is checked here: lengths, counts, duplicate names, kinds of
number, offsets (no hole, no overlap, no byte left over), and the values, since NaN and infinity are legal in the format. Headers
that other writers make a little differently are read all the same: spaces around it, "__metadata__": null, metadata that is not text,
tensors in any order, tensors without an element.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from composition import untrusted
from composition.refusal import Refused

MAX_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
MAX_NAME = 1000  # letters
MAX_QUOTED = 200  # letters of a name in a refusal
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
ENDING = ".safetensors"

_FIRST = 4096  # bytes read to see what a file is
_CHUNK = 2**20  # numbers looked at at a time, so that looking takes little memory beside the file
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}
_BYTES = {kind: dtype.itemsize for kind, dtype in _DTYPES.items()}  # of one number
_FIELDS = {"dtype", "shape", "data_offsets"}

# What people often have instead of the file they meant, by its first bytes.
_IMPOSTORS = (
    (b"PK", "a zip or pickle file: loading it could run code"),
    (b"\x80", "a pickle file: loading it could run code"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: fetch it with git lfs pull"),
    (b"<", "a web page, not a model: the download probably asked for a login"),
    (b"{", "JSON text"),
)


class NotNow(Refused):
    """A file could not be read this time: a disk, a network or the memory failed, or it was being written. Another time it may be read."""


@dataclass(frozen=True, eq=False)
class SafeFile:
    """tensors: name to CPU tensor as stored, every value finite. metadata: the header's own words, untrusted. largest: name to the
    largest absolute value of a tensor, 0 for one of zeros or without an element.

    sha256 is of the whole file, tensor_sha256 of the sorted names, dtypes, shapes and bytes, data_sha256 of all
    bytes after the header. Of a file whose header alone was read,
    the tensors are on the device "meta" and the hashes are "".
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str = ""
    tensor_sha256: str = ""
    data_sha256: str = ""
    largest: Mapping[str, float] = field(default_factory=dict)


class _Entry(NamedTuple):
    """One tensor of a header: the format's name of its numbers, its shape, and its bytes from the first number on."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Header(NamedTuple):
    """raw: its bytes, the length before it included. entries: in the order of their bytes."""

    raw: bytes
    entries: Mapping[str, _Entry]
    metadata: Mapping[str, str]


def load_safely(path: Path) -> SafeFile:
    """The tensors and metadata of a .safetensors file. Raises Refused, in plain words, for anything else.

    Needs the file's size in memory, once.
    """
    with _opened(path) as file:
        header = _header(path, file)
        file.seek(len(header.raw))
        tensors = {name: _tensor(path, file, entry) for name, entry in header.entries.items()}
    with ThreadPoolExecutor(3) as pool:  # the hashes take longest, and let other threads run
        whole = pool.submit(_hash, header.raw, tensors)
        data = pool.submit(_hash, b"", tensors)
        named = pool.submit(_tensor_hash, header.entries, tensors)
        sizes = {name: largest(tensors[name]) for name in sorted(tensors)}
    for name, size in sizes.items():
        if not math.isfinite(size):
            raise Refused(f"{path.name}: tensor {_quoted(name)} holds NaN or infinity: the file is broken, do not use it")
    return SafeFile(tensors, header.metadata, whole.result(), named.result(), data.result(), sizes)


def load_header(path: Path) -> SafeFile:
    """The names, shapes and metadata of a .safetensors file, from its header: no number is read. Raises Refused as `load_safely`."""
    with _opened(path) as file:
        header = _header(path, file)
        tensors = {name: _without_numbers(entry.shape, entry.kind) for name, entry in header.entries.items()}
    return SafeFile(tensors, header.metadata)


@lru_cache(maxsize=4096)  # thousands of tensors of a library have the same few shapes
def _without_numbers(shape: tuple[int, ...], kind: str) -> Tensor:
    return torch.empty(shape, dtype=_DTYPES[kind], device="meta")


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    if path.suffix.lower() in PICKLES:
        raise Refused(f"{path.name} is a pickle file: opening it can run code. Get the .safetensors version, or convert it: "
                      f"medley convert {path.name} OUT.safetensors --unsafe-pickle")
    try:
        if path.is_dir():
            raise Refused(f"{path.name} is a folder: name the .safetensors file in it")
        if not path.exists() and not path.is_symlink():
            raise Refused(f"there is no file {path.name}")
        if path.suffix.lower() != ENDING:
            raise Refused(f"{path.name} is not a .safetensors file, the only kind that is read")
        with untrusted.opened(path, MAX_BYTES) as file:
            yield file
    except Refused:
        raise
    except untrusted.Unreadable as error:
        raise Refused(f"{path.name} {error}") from None
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch has no memory: RuntimeError
        raise NotNow(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or str(error)[:200] or 'no memory for it'}") from None


def _header(path: Path, file: FileIO) -> _Header:
    """The header of an open file, checked against its size: at most MAX_TENSORS entries, no name twice, every byte in one tensor."""
    size = os.fstat(file.fileno()).st_size
    raw = _read(file, min(size, _FIRST))
    json_follows = raw[8:].lstrip(b" \t\r\n").startswith(b"{")
    for magic, what in _IMPOSTORS:
        if raw.startswith(magic) and not json_follows:
            raise Refused(f"{path.name} is {what}")
    if size < 10:
        raise Refused(f"{path.name} is damaged ({size} bytes is too short): download it again")
    if not json_follows:
        raise Refused(f"{path.name} is not a safetensors file, whatever its name says")
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise Refused(f"{path.name} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if 8 + length > size:
        raise Refused(f"{path.name} is damaged (it ends inside its header): download it again")
    raw = (raw + _read(file, 8 + length - len(raw)))[: 8 + length]
    try:
        table = untrusted.parse(raw[8:], odd_letters=True)
        metadata = _metadata(table.pop("__metadata__", None))
        if 0 < len(table) <= MAX_TENSORS:
            entries = _entries(table, size - 8 - length)
    except _Kind as error:
        raise Refused(f"{path.name} holds a kind of number that cannot be read ({error})") from None
    except (ValueError, AttributeError) as error:  # untrusted.Unreadable is a ValueError
        raise Refused(f"{path.name} is damaged (its header: {str(error)[:200]}): download it again") from None
    if not 0 < len(table) <= MAX_TENSORS:
        raise Refused(f"{path.name} holds {len(table)} tensors; 1 to {MAX_TENSORS} are read")
    return _Header(raw, entries, metadata)


class _Kind(Exception):
    """A kind of number that the format has and torch does not."""


def _metadata(metadata: object) -> dict[str, str]:
    """A header's metadata as text, also where other writers left numbers, lists or null. Raises ValueError."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError("its __metadata__ is not a JSON object")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items() if value is not None}
    return {_text(key): _text(value) for key, value in texts.items()}


def _text(value: str) -> str:
    """The same without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return value.encode("utf-8", "replace").decode()


def _entries(table: Mapping[str, Any], size: int) -> dict[str, _Entry]:
    """The tensors of a header in the order of their bytes, which fill `size` without hole or overlap. Raises ValueError, _Kind."""
    entries = {name: _entry(name, value) for name, value in table.items()}
    entries = dict(sorted(entries.items(), key=lambda pair: pair[1][2:]))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise ValueError(f"the bytes of {_quoted(name)} do not begin where those before it end")
        end = entry.stop
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, the file has {size}")
    return entries


def _entry(name: str, value: Any) -> _Entry:
    if len(name) > MAX_NAME:
        raise ValueError(f"a tensor's name has {len(name):,} letters; at most {MAX_NAME:,} are read")
    if not (name.isascii() or _text(name) == name) or not isinstance(value, dict) or not _FIELDS <= value.keys():
        raise ValueError(f"{_quoted(name)} is not a tensor")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise _Kind(_quoted(kind))
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the shape or the place of {_quoted(name)} cannot be read")
    if max(shape, default=0) >= 2**63 or offsets[1] - offsets[0] != math.prod(shape) * _BYTES[kind]:
        raise ValueError(f"{_quoted(name)} does not have as many bytes as its shape says")
    return _Entry(kind, tuple(shape), *offsets)


def _counts(value: Any) -> bool:
    """True for a list of whole numbers from 0."""
    if type(value) is not list:
        return False
    for number in value:  # a loop: this is asked of every tensor of thousands of headers
        if type(number) is not int or number < 0:
            return False
    return True


def _tensor(path: Path, file: FileIO, entry: _Entry) -> Tensor:
    """The next tensor of an open file."""
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=_DTYPES[entry.kind])
    numbers = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    room = _bytes(numbers)
    while room:
        count = file.readinto(room)
        if not count:
            raise NotNow(f"{path.name} was cut short while it was read: try again")
        room = room[count:]
    return numbers.view(_DTYPES[entry.kind]).reshape(entry.shape)


def _bytes(numbers: Tensor) -> memoryview:
    """A tensor of bytes as the memory it lies in."""
    array: Any = numbers.numpy()
    return memoryview(array)


def _read(file: FileIO, count: int) -> bytes:
    """Up to `count` bytes, less only at the end of the file."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def largest(tensor: Tensor) -> float:
    """The largest absolute value, NaN where there is one; 0 of what has no element. Needs a few megabytes, whatever its size."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    peak = 0.0
    for part in flat.split(_CHUNK):
        if part.numel():
            low, high = part.to(torch.float64 if part.itemsize == 8 else torch.float32).aminmax()  # both NaN where one is
            peak = max(abs(low.item()), abs(high.item()), peak) if high == high else math.nan
        if not math.isfinite(peak):
            break
    return peak


def _quoted(name: object) -> str:
    """What a refusal repeats of a name: its beginning, with nothing in it that could move a cursor."""
    return f"{_text(str(name))[:MAX_QUOTED]!r}"


def _hash(first: bytes, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over these bytes and those of the tensors, in their order."""
    digest = hashlib.sha256(first)
    for tensor in tensors.values():
        if tensor.numel():
            digest.update(_bytes(tensor.reshape(-1).view(torch.uint8)))
    return digest.hexdigest()


def _tensor_hash(entries: Mapping[str, _Entry], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the tensors in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        digest.update(json.dumps([name, entries[name].kind, list(entries[name].shape)]).encode())
        if tensors[name].numel():
            digest.update(_bytes(tensors[name].reshape(-1).view(torch.uint8)))
    return digest.hexdigest()
