"""Measurements of LoRAs, kept as files by the LoRA's tensors and the model: the user's own first, then the bundled ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composition import atomic, bundled, untrusted
from composition.profiles.frequency import Profile
from composition.refusal import Refused


@dataclass(frozen=True)
class ProfileStore:
    """folder: where profiles are written and looked for first; None: the bundled ones alone, and nothing can be written."""

    folder: Path | None = None

    def frequency(self, tensor_sha256: str, model: str) -> Profile | None:
        """The frequency profile of these tensors on this model; None when it was never measured. Raises Refused for a damaged file."""
        for folder in self._folders(model):
            file = folder / _file_name(tensor_sha256, model)
            if file.is_file():
                profile = _read(file)
                if profile.tensor_sha256 == tensor_sha256:
                    return profile
        return None

    def keep(self, profile: Profile) -> Path:
        """Write it, whole or not at all, and return its file. Raises ValueError for a store without a folder."""
        if self.folder is None:
            raise ValueError("this store has no folder to write to")
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep(self.folder, shared=True)
        return atomic.write(self.folder / _file_name(profile.tensor_sha256, profile.model), profile.json() + "\n")

    def _folders(self, model: str) -> Sequence[Path]:
        own = [self.folder] if self.folder is not None else []
        return [*own, bundled.path(bundled.BUNDLES[model].profiles)] if model in bundled.BUNDLES else own


def _read(file: Path) -> Profile:
    try:
        return Profile.read(untrusted.read(file))
    except (Refused, untrusted.Unreadable) as error:
        raise Refused(f"{file} cannot be used ({error}): measure it again with `medley profile --again`, or delete the file") from None


def _file_name(tensor_sha256: str, model: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(model).name)}-{tensor_sha256[:20]}.json"
