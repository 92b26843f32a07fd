"""The files that the page may serve: the pictures of jobs that have finished here, those that the Gallery tab showed, and its last archive, each at an address
that nobody can guess.

Nothing else of the folder of pictures can be asked for, and no path is part of an address.
"""

import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from urllib.parse import quote, unquote

PREFIX = "/pictures/"
HEADERS = {  # a file is shown as a picture or not at all, whatever is in it by now
    "content-type": "image/png", "x-content-type-options": "nosniff", "content-security-policy": "default-src 'none'; sandbox",
    "cache-control": "private, max-age=3600"}  # fmt: skip
ARCHIVE = {**HEADERS, "content-type": "application/zip", "cache-control": "no-store"}


class Gallery:
    """Addresses of pictures. To be used from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._paths: dict[str, Path] = {}
        self._addresses: dict[Path, str] = {}
        self._archive: tuple[str, Path] | None = None

    def add(self, path: Path) -> Path:
        """Let this file be served."""
        self.served(path)
        return path

    def served(self, path: Path) -> str:
        """Where a file is served, from now on."""
        with self._lock:
            if path not in self._addresses:
                address = f"{PREFIX}{secrets.token_urlsafe(16)}/{path.name}"
                self._paths[address] = path.absolute()
                self._addresses[path] = address
            return quote(self._addresses[path])

    def address(self, path: Path) -> str:
        """Where a file that was added is served."""
        return quote(self._addresses[path])

    def path(self, address: str) -> Path | None:
        """The picture that is served at an address; None where there is none. A tab that names a picture names its address."""
        return self._paths.get(unquote(address))

    def read(self, address: str) -> tuple[bytes, Mapping[str, str]] | None:
        """The bytes at a (still quoted or unquoted) address, with their headers; None where there is nothing, or no plain file any more."""
        archive = self._archive
        if archive and unquote(address) == archive[0]:
            path, headers = archive[1], ARCHIVE
        else:
            path, headers = self._paths.get(unquote(address)), HEADERS
        try:
            return (path.read_bytes(), headers) if path is not None and stat.S_ISREG(path.lstat().st_mode) else None
        except OSError:
            return None

    def archive(self, path: Path) -> str:
        """Serve an archive, which has a folder of its own, in place of the last one; its address."""
        self.forget_archives()
        self._archive = (f"{PREFIX}{secrets.token_urlsafe(16)}/{path.name}", path)
        return quote(self._archive[0])

    def forget_archives(self) -> None:
        """Take the last archive away."""
        archive, self._archive = self._archive, None
        if archive:
            shutil.rmtree(archive[1].parent, ignore_errors=True)
