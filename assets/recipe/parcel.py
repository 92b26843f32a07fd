"""Finished files as few small ones, to be carried from a machine that lets only so much out.

Half-precision weights have bytes that vary little beside bytes that vary much: each kind by itself under a Huffman code takes a sixth
less. A parcel is a tar archive coded so, cut into parts of at most 16 MiB.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

PART = 16 * 2**20 - 4096  # bytes
SUFFIX = ".parcel"


def pack(folder: Path, paths: Iterable[Path], target: Path, name: str) -> list[Path]:
    """Write the files of ``folder`` to ``target``/name.0.parcel, name.1.parcel, ...; each part appears whole."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for path in sorted(paths):
            archive.add(path, str(path.relative_to(folder)), filter=_plain)
    data, parts = coded(held.getvalue()), []
    for number, start in enumerate(range(0, len(data), PART)):
        parts.append(target / f"{name}.{number}{SUFFIX}")
        half = parts[-1].with_suffix(".half")
        half.write_bytes(data[start : start + PART])
        half.replace(parts[-1])
    return parts


def unpack(source: Path, name: str, folder: Path) -> None:
    """Write the files of a parcel into ``folder``."""
    parts = sorted(source.glob(f"{name}.*{SUFFIX}"), key=lambda part: int(part.suffixes[-2][1:]))
    data = decoded(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")


def coded(data: bytes) -> bytes:
    """Bytes at even places, then those at odd ones, each under a Huffman code; the length of the first before them."""
    planes = []
    for plane in (data[0::2], data[1::2]):
        coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
        planes.append(coder.compress(plane) + coder.flush())
    return len(planes[0]).to_bytes(8, "little") + planes[0] + planes[1]


def decoded(data: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    even, odd = zlib.decompress(data[8:end]), zlib.decompress(data[end:])
    whole = bytearray(len(even) + len(odd))
    whole[0::2], whole[1::2] = even, odd
    return bytes(whole)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of this machine in the archive: no owner, no clock."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime, entry.mode = 0, 0o644
    return entry
