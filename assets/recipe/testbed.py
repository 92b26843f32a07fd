"""The testbed: one character and at most one LoRA of each other category, in ComposLoRA's form (arXiv 2402.16843).

Each entry has besides id, name, trigger and url the ``phrase`` that says it in a prompt; the phrases of a set, in the order
of the categories, are its prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

from .loras import TOLD, Told, stem
from .objects import article

CATEGORIES = ("character", "clothing", "object", "background", "style")  # ComposLoRA says background where a LoRA says place


def phrase(name: str, told: Told) -> str:
    """As it stands in a prompt after what comes before: "a raccoon", " wearing a scarf", " on the moon", ", ink drawing"."""
    return {
        "character": article(name), "clothing": f" wearing {article(name)}", "object": f" and {article(name)}",
        "place": f" {told.triggers}", "style": f", {told.triggers}",
    }[told.category]  # fmt: skip


def testbed() -> dict[str, list[dict[str, object]]]:
    """Category to its entries."""
    rows: dict[str, list[dict[str, object]]] = {category: [] for category in CATEGORIES}
    for name, told in TOLD.items():
        entry = {"id": stem(name), "name": told.title, "trigger": [told.triggers], "phrase": phrase(name, told), "url": ""}
        rows["background" if told.category == "place" else told.category].append(entry)
    return rows


def write(file: Path) -> None:
    file.write_text(json.dumps(testbed(), indent=2) + "\n")
