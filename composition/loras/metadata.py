"""What the header of a LoRA file says besides its tensors: title, category, trigger words, the trainer's name for it.

All of it is untrusted text: it is shown and searched, never executed, and never taken for a key or a shape.
"""

from collections.abc import Mapping
from typing import get_args

from composition.request import Category

MAX_TRIGGERS = 64
MAX_LETTERS = 200


def title(metadata: Mapping[str, str]) -> str:
    return line(metadata.get("title") or metadata.get("modelspec.title") or "")


def category(metadata: Mapping[str, str]) -> str:
    """One of `Category`, or "" for anything else."""
    value = metadata.get("category", "").strip().lower()
    return value if value in get_args(Category) else ""


def triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger words, in order, each once: "trigger_words" split at commas, else "modelspec.trigger_phrase"."""
    text = metadata.get("trigger_words") or metadata.get("modelspec.trigger_phrase") or ""
    words = (line(word) for word in text.split(","))
    return tuple(dict.fromkeys(word for word in words if word))[:MAX_TRIGGERS]


def line(text: str, most: int = MAX_LETTERS) -> str:
    """A text as one line of at most `most` letters, without what no file name and no index can hold."""
    text = text[: 4 * most].replace("\0", "").encode("utf-8", "replace").decode()
    return " ".join(text.split())[:most]


def alias(metadata: Mapping[str, str]) -> str:
    """The name that the trainer gave the file ("ss_output_name"): other tools find it by that too. "" without."""
    return metadata.get("ss_output_name", "").strip()
