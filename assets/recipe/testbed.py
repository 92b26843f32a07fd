"""The testbed: one character and at most one LoRA of each other category, in ComposLoRA's form (arXiv 2402.16843).

Each entry has besides id, name, trigger and url: ``phrase``, which says it in a prompt (the phrases of a set, in the order
of the categories, are its prompt); ``concept``, what a judge is asked of a picture; ``alone``, a prompt for it by itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from .loras import TOLD, Told, asked, stem
from .objects import article

CATEGORIES = ("character", "clothing", "object", "background", "style")  # ComposLoRA says background where a LoRA says place


def phrase(name: str, told: Told) -> str:
    """As it stands in a prompt after what comes before: "a raccoon", " wearing a scarf", " on the moon", ", ink drawing"."""
    return {
        "character": article(name), "clothing": f" wearing {article(name)}", "object": f" and {article(name)}",
        "place": f" {told.triggers}", "style": f", {told.triggers}",
    }[told.category]  # fmt: skip


def alone(name: str, told: Told) -> str:
    """A prompt with nothing else that is new: something to wear, a place and a style need somebody the base knows."""
    return {
        "clothing": f"a fox wearing {article(name)}", "place": f"a fox {told.triggers}", "style": f"a fox, {told.triggers}",
    }.get(told.category, article(name))  # fmt: skip


def testbed(names: Collection[str] = tuple(TOLD)) -> dict[str, list[dict[str, object]]]:
    """Category to its entries."""
    rows: dict[str, list[dict[str, object]]] = {category: [] for category in CATEGORIES}
    for name, told in ((name, told) for name, told in TOLD.items() if name in names):
        entry = {"id": stem(name), "name": told.title, "trigger": [told.triggers], "phrase": phrase(name, told), "concept": asked(name),
                 "alone": alone(name, told), "url": ""}  # fmt: skip
        rows["background" if told.category == "place" else told.category].append(entry)
    return rows


def write(file: Path, names: Collection[str] = tuple(TOLD)) -> None:
    file.write_text(json.dumps(testbed(names), indent=2) + "\n")
