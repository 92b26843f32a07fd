"""The pictures that the page may serve: those of jobs that have finished here, each at an address that nobody can guess.

Nothing else of the folder of pictures can be asked for, and no path is part of an address.
"""

import secrets
import stat
from pathlib import Path
from urllib.parse import quote, unquote

PREFIX = "/pictures/"
HEADERS = {  # a file is shown as a picture or not at all, whatever is in it by now
    "content-type": "image/png", "x-content-type-options": "nosniff", "content-security-policy": "default-src 'none'; sandbox",
    "cache-control": "private, max-age=3600"}  # fmt: skip


class Gallery:
    """Addresses of pictures. Add from one thread, look up from others."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}
        self._addresses: dict[Path, str] = {}

    def add(self, path: Path) -> Path:
        """Let this file be served."""
        address = f"{PREFIX}{secrets.token_urlsafe(16)}/{path.name}"
        self._paths[address] = path.absolute()
        self._addresses[path] = address
        return path

    def address(self, path: Path) -> str:
        """Where a file that was added is served."""
        return quote(self._addresses[path])

    def path(self, address: str) -> Path | None:
        """The file that is served at an address; None where there is none. A tab that names a picture names its address."""
        return self._paths.get(unquote(address))

    def read(self, address: str) -> bytes | None:
        """The bytes of the picture at a (still quoted or unquoted) address; None where there is none, or it is no plain file any more."""
        path = self._paths.get(unquote(address))
        try:
            return path.read_bytes() if path is not None and stat.S_ISREG(path.lstat().st_mode) else None
        except OSError:
            return None
