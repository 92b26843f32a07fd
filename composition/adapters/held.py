"""LoRA files that were read: each once, kept in bounded memory by what it holds, the next ones read ahead while the model works."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from composition.adapters.ahead import Ahead
from composition.loras import reader

KEPT_BYTES = 2 * 2**30  # main memory for the factors of LoRA files, least recently used first out
ORDINARY_HEADER = 2**16  # letters of a file's metadata that are not counted


class Held:
    """The files of one base. kept_bytes: main memory for those that may be asked for again."""

    def __init__(self, components: Mapping[str, nn.Module], family: str, kept_bytes: int) -> None:
        self._components, self._family, self._kept_bytes = components, family, kept_bytes
        self.files: dict[tuple[str, str, bool], reader.LoraFile] = {}  # by what they hold, the last used last
        self.stamps: dict[tuple[object, ...], tuple[str, str, bool]] = {}  # state of a file on disk to what it holds
        self._ahead: Ahead[reader.LoraFile] = Ahead()

    def close(self) -> None:
        """Read no file ahead any more."""
        self._ahead.close()

    def read(self, path: Path, name: str, allow_partial: bool) -> reader.LoraFile:
        """A file as read for this base; its receipt has this name and path, whichever file of the same content was read first."""
        path = path.absolute()  # as it was named: a link and its target have different files beside them
        stamp = _stamp(path, allow_partial)
        key = self.stamps.get(stamp)
        file = self.files.pop(key, None) if key else None
        if file is None:
            file = self._ahead.take(stamp) or reader.read(path, self._components, self._family, name=name, allow_partial=allow_partial)
            key = (file.receipt.sha256, file.outside, allow_partial)
            file = self.files.pop(key, file)
        assert key is not None
        self.files[key] = file  # most recently used last
        self.stamps[stamp] = key
        self._forget()
        return replace(file, receipt=replace(file.receipt, name=name, path=reader.shown(path)))

    def prefetch(self, paths: Sequence[Path], allow_partial: bool) -> None:
        """Read these files in another thread, for `read` to find them; what was read ahead and not asked for is let go of.

        Of files already held nothing is read, and never more than half as much as may be kept. What is wrong with a file is said when it is
        asked for.
        """
        reads: dict[Hashable, Callable[[], reader.LoraFile]] = {}
        room = self._kept_bytes // 2
        for path in map(Path.absolute, paths):
            with suppress(OSError):
                stamp, size = _stamp(path, allow_partial), path.stat().st_size
                if stamp and stamp not in self.stamps and size <= room:
                    room -= size
                    reads[stamp] = partial(reader.read, path, self._components, self._family, allow_partial=allow_partial)
        self._ahead.want(reads)

    def _forget(self) -> None:
        """Let go of the files used longest ago until those that stay fit into their memory."""
        held = {key: file.nbytes + _words(file) for key, file in self.files.items()}
        total = sum(held.values())
        for key, size in held.items():
            if total <= self._kept_bytes:
                break
            total -= size
            del self.files[key]
        self.stamps = {stamp: key for stamp, key in self.stamps.items() if key in self.files}


def _stamp(path: Path, allow_partial: bool) -> tuple[object, ...]:
    return (allow_partial, *reader.stamp(path)) if path.is_file() else ()


def _words(file: reader.LoraFile) -> int:
    """Letters of a file's metadata beyond an ordinary header's: its author decides on them."""
    return max(0, sum(len(key) + len(value) for key, value in file.receipt.metadata.items()) - ORDINARY_HEADER)
