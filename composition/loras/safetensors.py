"""Opening a .safetensors file somebody else wrote: read once, checked before it is believed.

The format is 8 bytes of header length, a JSON header, then raw numbers; nothing in it is ever executed. The bytes are
read once, so the hashes, the header and the tensors are of one and the same file even when it is replaced meanwhile.
Lengths, counts and duplicate names are checked here, offsets and sizes by the safetensors library, values here again
(NaN and infinity are legal in the format).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from composition.request import Refused

MAX_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")

# What people have in place of the file they meant, by its first bytes.
_IMPOSTORS = (
    (b"PK", "a zip or pickle file: loading it could run code"),
    (b"\x80", "a pickle file: loading it could run code"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: fetch it with git lfs pull"),
    (b"<", "a web page, not a model: the download probably asked for a login"),
    (b"{", "JSON text"),
)


@dataclass(frozen=True, eq=False)
class SafeFile:
    """tensors: name to CPU tensor as stored, every value finite. metadata: the header's own words, untrusted.

    sha256 is of the whole file, tensor_sha256 of the sorted names, dtypes, shapes and bytes, data_sha256 of all after the header.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str
    tensor_sha256: str
    data_sha256: str


def load_safely(path: Path) -> SafeFile:
    """The tensors and metadata of a .safetensors file. Raises Refused, in plain words, for anything else."""
    data = _bytes(path)
    start, header = _header(path, data)
    metadata = header.pop("__metadata__", {})
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise Refused(f"{path.name} is damaged ({error}): download it again") from None
    except (KeyError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        raise Refused(f"{path.name} holds a kind of number that cannot be read ({error})") from None
    for name in sorted(tensors):
        if tensors[name].dtype.is_floating_point and not torch.isfinite(tensors[name].float()).all():
            raise Refused(f"{path.name}: tensor {name!r} holds NaN or infinity: the file is broken, do not use it")
    numbers = memoryview(data)[start:]
    return SafeFile(tensors, metadata, hashlib.sha256(data).hexdigest(), _tensor_hash(header, numbers), hashlib.sha256(numbers).hexdigest())


def _bytes(path: Path) -> bytes:
    if path.suffix.lower() in PICKLES:
        raise Refused(f"{path.name} is a pickle file: opening it can run code. Get the .safetensors version")
    try:
        if path.is_dir():
            raise Refused(f"{path.name} is a folder: name the .safetensors file in it")
        if not path.exists():
            raise Refused(f"there is no file {path.name}")
        if path.suffix.lower() != ".safetensors" or not path.is_file():
            raise Refused(f"{path.name} is not a .safetensors file, the only kind that is read")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise Refused(f"{path.name} has {size} bytes; at most {MAX_BYTES} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _header(path: Path, data: bytes) -> tuple[int, dict[str, Any]]:
    """Where the numbers start, and the JSON header: at most MAX_TENSORS entries, no name twice."""
    for magic, what in _IMPOSTORS:
        if data.startswith(magic) and data[8:9] != b"{":
            raise Refused(f"{path.name} is {what}")
    if len(data) < 10:
        raise Refused(f"{path.name} is damaged ({len(data)} bytes is too short): download it again")
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{":
        raise Refused(f"{path.name} is not a safetensors file, whatever its name says")
    if length > MAX_HEADER_BYTES:
        raise Refused(f"{path.name} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if 8 + length > len(data):
        raise Refused(f"{path.name} is damaged (it ends inside its header): download it again")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path.name} is damaged (its header: {str(error)[:200]}): download it again") from None
    count = len(header) - ("__metadata__" in header)
    if not 0 < count <= MAX_TENSORS:
        raise Refused(f"{path.name} holds {count} tensors; 1 to {MAX_TENSORS} are read")
    return 8 + length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is given twice")
    return made


def _tensor_hash(header: Mapping[str, Any], numbers: memoryview) -> str:
    """sha256 over the tensors in the order of their names; header without metadata, already checked by `load`."""
    made = hashlib.sha256()
    for name in sorted(header):
        entry = header[name]
        first, last = entry["data_offsets"]
        made.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        made.update(numbers[first:last])
    return made.hexdigest()
