"""Cards: what the library knows of one LoRA file, and a card as text, in which the catalogue keeps it.

Everything on a card but its numbers is somebody else's text: it is shown and searched, never executed, and no path in it is opened.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from composition.loras.reader import shown

Origin = Literal["header", "training tags", "sidecar", "user"]
IN_HEADER = "header"  # where a preview is that is no file of its own
AUTOV2 = 10  # hexadecimal digits of a file's sha256, as Civitai shows them
MAX_TRIGGERS = 64
FORM = 1  # of a card as text and of what is taken from a header: another one has every header read again


class Trigger(NamedTuple):
    """A word and who states it. "training tags" are words of the captions that it was trained with: hints, not trigger words."""

    word: str
    origin: Origin


@dataclass(frozen=True)
class Card:
    """path: of the file, absolute. size, mtime_ns, inode: its state when it was read (inode 0: the file system has none).

    sha256 is of the whole file, tensor_sha256 of names, dtypes, shapes and bytes of the tensors, data_sha256 of the bytes after the
    header (AutoV3); all "" until the file was read whole. alias: the trainer's name for it. family: "sd", "sd2", "sdxl", "sd3", "flux" or
    "unknown", of the keys; base: what metadata says of the base ("Illustrious"). weight: the one recommended. ranks, alphas: value to
    number of layers; coverage: component to number of layers that can be applied; no_effect: how many of them are zero. strength,
    effective_rank, spike: as of `singular.Figures`. preview: the path of a picture, "header", or "". remarks: what a user should know.
    trouble: why it cannot be used, "" when it can.
    """

    path: Path
    size: int = 0
    mtime_ns: int = 0
    inode: int = 0
    sha256: str = ""
    tensor_sha256: str = ""
    data_sha256: str = ""
    title: str = ""
    alias: str = ""
    category: str = ""
    family: str = "unknown"
    layout: str = ""
    base: str = ""
    triggers: tuple[Trigger, ...] = ()
    description: str = ""
    tags: tuple[str, ...] = ()
    licence: str = ""
    preview: str = ""
    weight: float | None = None
    tensors: int = 0
    ranks: Mapping[int, int] = field(default_factory=dict)
    alphas: Mapping[float, int] = field(default_factory=dict)
    coverage: Mapping[str, int] = field(default_factory=dict)
    no_effect: int = 0
    strength: float | None = None
    effective_rank: float | None = None
    spike: float | None = None
    stated_sha256: tuple[str, ...] = ()  # of the file that its sidecars are of, as they say
    remarks: tuple[str, ...] = ()
    trouble: str = ""

    @property
    def name(self) -> str:
        return shown(self.path.stem)

    @property
    def autov2(self) -> str:
        return self.sha256[:AUTOV2].upper()

    @property
    def usable(self) -> bool:
        return not self.trouble

    @property
    def words(self) -> str:
        """All that full-text search looks at, a line each."""
        lines = (self.title, self.name, self.alias, *(trigger.word for trigger in self.triggers), *self.tags, self.base, self.description)
        return "\n".join(dict.fromkeys(line for line in lines if line))

    def words_of(self, *origins: Origin) -> tuple[str, ...]:
        """The trigger words that these state, in order."""
        return tuple(trigger.word for trigger in self.triggers if trigger.origin in origins)

    def text(self) -> str:
        """All but the path, as JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "path"}
        return json.dumps({name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()},
                          separators=(",", ":"))


def read(path: Path, text: str) -> Card:
    """The card of this path from `Card.text`. Raises ValueError, KeyError or TypeError for what is none."""
    values: dict[str, Any] = json.loads(text)
    values["triggers"] = tuple(Trigger(*each) for each in values["triggers"])
    values["ranks"] = {int(rank): count for rank, count in values["ranks"].items()}
    values["alphas"] = {float(alpha): count for alpha, count in values["alphas"].items()}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Card(path, **values)


def distinct(triggers: Iterable[Trigger]) -> tuple[Trigger, ...]:
    """Each word once, whatever its case, from the first who states it."""
    by_word: dict[str, Trigger] = {}
    for trigger in triggers:
        by_word.setdefault(trigger.word.casefold(), trigger)
    return tuple(by_word.values())[:MAX_TRIGGERS]
