"""Measurements of LoRAs, kept as files by the LoRA's tensors and the model: the user's own first, then the bundled ones.

Every kind of measurement has an ending of its own for its files; a LoRA has at most one of each, the last that was measured. What was
measured of a set of LoRAs has a file by everything it depends on, and stays in memory for the pictures that follow.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from composition import atomic, bundled, untrusted
from composition.profiles.behaviour import Behaviour
from composition.profiles.frequency import Profile
from composition.profiles.mixing import ENDING as MIXING
from composition.profiles.mixing import Measured, Mixing
from composition.refusal import Refused

Kind = TypeVar("Kind", Profile, Behaviour)
REMEMBERED = 8  # sets of LoRAs whose matrices stay in memory


@dataclass(frozen=True)
class ProfileStore:
    """folder: where profiles are written and looked for first; None: the bundled ones alone, and nothing can be written."""

    folder: Path | None = None
    _mixings: dict[str, Mixing] = field(default_factory=dict, compare=False, repr=False)  # by key, the last used last

    def frequency(self, tensor_sha256: str, model: str) -> Profile | None:
        """The frequency profile of these tensors on this model; None when it was never measured. Raises Refused for a damaged file."""
        return next(self._kept(Profile, tensor_sha256, model), None)

    def behaviour(self, tensor_sha256: str, model: str, judge: str) -> Behaviour | None:
        """The behaviour of these tensors on this model as this image encoder sees it; None and Refused as `frequency`."""
        return next((held for held in self._kept(Behaviour, tensor_sha256, model) if held.judge == judge), None)

    def remembered(self, measured: Measured) -> Mixing | None:
        """The matrices measured like this by this process."""
        if (held := self._mixings.pop(measured.key, None)) is not None:
            self._mixings[measured.key] = held
        return held

    def remember(self, measured: Measured, mixing: Mixing) -> None:
        self._mixings[measured.key] = mixing
        while len(self._mixings) > REMEMBERED:
            del self._mixings[next(iter(self._mixings))]

    def mixing_file(self, measured: Measured) -> Path | None:
        """Where matrices measured like this are kept, whether they are there or not; None for a store without a folder."""
        return self.folder / f"{measured.key[:40]}{MIXING}" if self.folder is not None else None

    def keep(self, measured: Profile | Behaviour) -> Path:
        """Write it, whole or not at all, and return its file. Raises ValueError for a store without a folder."""
        if self.folder is None:
            raise ValueError("this store has no folder to write to")
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep(self.folder, shared=True)
        return atomic.write(self.folder / _file_name(measured.tensor_sha256, measured.model, measured.ENDING), measured.json() + "\n")

    def _kept(self, kind: type[Kind], tensor_sha256: str, model: str) -> Iterator[Kind]:
        """The user's own first, then the bundled one."""
        for folder in self._folders(model):
            file = folder / _file_name(tensor_sha256, model, kind.ENDING)
            if file.is_file():
                measured = _read(file, kind)
                if measured.tensor_sha256 == tensor_sha256:
                    yield measured

    def _folders(self, model: str) -> Sequence[Path]:
        own = [self.folder] if self.folder is not None else []
        return [*own, bundled.path(bundled.BUNDLES[model].profiles)] if model in bundled.BUNDLES else own


def _read(file: Path, kind: type[Kind]) -> Kind:
    try:
        return kind.read(untrusted.read(file))
    except (Refused, untrusted.Unreadable) as error:
        raise Refused(f"{file} cannot be used ({error}): measure it again with {kind.AGAIN}, or delete the file") from None


def _file_name(tensor_sha256: str, model: str, ending: str = Profile.ENDING) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(model).name)}-{tensor_sha256[:20]}{ending}"
