"""LoRA files that were dropped onto the page: kept in a folder of their own until Medley ends, within bounds, each with its receipt.

They come through the door as they are, a file a request, and are named by what is left of their name. None is written into a folder of the user's.
"""

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from app.errors import sentence
from app.terminal import printable
from composition import Refused

if TYPE_CHECKING:
    from composition import Engine

PREFIX = "/dropped/"
MOST_BYTES = 2_000_000_000  # of one file
MOST_TOGETHER = 4_000_000_000
MOST_FILES = 64
SPARE = 1_000_000_000  # bytes that stay free on the disk

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Drops:
    """The folder of dropped files, for the time of a context."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._folder = Path(tempfile.mkdtemp(prefix="medley-dropped-"))
        self._coming = 0  # bytes that were let in and are not there yet
        self._count = 0

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def files(self) -> list[Path]:
        """Those that are there, oldest first."""
        return sorted(self._folder.glob("*/*.safetensors"))

    async def take(self, address: str, length: int, receive: Receive) -> dict[str, str]:
        """The file that a request brings: {name, receipt}, or {trouble}. What cannot be used is not kept."""
        try:
            name = _name(address)
            self._room(length)
        except Refused as error:
            return {"trouble": sentence(error)}
        self._count += 1
        self._coming += length
        path = self._folder / f"{self._count:04d}" / name
        try:
            await self._write(path, length, receive)
            receipt = await asyncio.to_thread(self._engine.inspect, str(path))
            if not receipt.applied:
                raise Refused(f"{name}: nothing of it fits this model ({receipt.line()})")
            return {"name": path.stem, "receipt": printable(receipt.line())}
        except Exception as error:
            with suppress(OSError):
                shutil.rmtree(path.parent)
            return {"trouble": printable(sentence(error)).replace(f"{path.parent}/", "")}
        finally:
            self._coming -= length

    def _room(self, length: int) -> None:
        files = self.files()
        held = sum(path.stat().st_size for path in files) + self._coming
        if length > MOST_BYTES:
            raise Refused(f"the file has over {MOST_BYTES // 10**9} GB: put it into a LoRA folder")
        if len(files) >= MOST_FILES or held + length > MOST_TOGETHER or shutil.disk_usage(self._folder).free < length + SPARE:
            raise Refused("there is no room for more dropped files: put it into a LoRA folder, or start Medley anew")

    async def _write(self, path: Path, length: int, receive: Receive) -> None:
        path.parent.mkdir()
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            more = True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refused("the file did not come whole")
                await asyncio.to_thread(file.write, message.get("body", b""))
                if file.tell() > length:
                    raise Refused("the file is longer than was said")
                more = message.get("more_body", False)
            if file.tell() != length:
                raise Refused("the file did not come whole")
        part.rename(path)


def _name(address: str) -> str:
    """A file's name out of an address: letters, digits and little else, and no folder. Raises Refused for what is no safetensors file."""
    name = re.split(r"[\\/]", unquote(address.removeprefix(PREFIX)))[-1]
    stem, dot, ending = name.rpartition(".")
    if not dot or ending.lower() != "safetensors":
        raise Refused(f"{printable(name)[:80]!r} is no .safetensors file: others are not opened, since they may run code")
    return (re.sub(r"[^\w .()+-]", "_", stem).strip(" .")[:80] or "dropped") + ".safetensors"


def answer(of: dict[str, str]) -> bytes:
    return json.dumps(of, ensure_ascii=False).encode()
