"""The testbed: one character and at most one LoRA of each other category, in ComposLoRA's form (arXiv 2402.16843).

Besides id, name, trigger and url each entry has ``phrase``, which says it in a prompt (the phrases of a set, in the order
of the categories, are its prompt); ``concept``, the phrase a judge looks for in a picture; ``alone``, a prompt for it by itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from .loras import CARDS, Card, judge_phrase, stem
from .objects import article

CATEGORIES = ("character", "clothing", "object", "background", "style")  # ComposLoRA says background where a LoRA says place


def phrase(name: str, card: Card) -> str:
    """As it stands in a prompt after what comes before: "a raccoon", " wearing a scarf", " on the moon", ", ink drawing"."""
    return {
        "character": article(name), "clothing": f" wearing {article(name)}", "object": f" and {article(name)}",
        "place": f" {card.triggers}", "style": f", {card.triggers}",
    }[card.category]  # fmt: skip


def alone(name: str, card: Card) -> str:
    """A prompt with nothing else that is new: something to wear, a place and a style need a subject that the base knows."""
    return {
        "clothing": f"a fox wearing {article(name)}", "place": f"a fox {card.triggers}", "style": f"a fox, {card.triggers}",
    }.get(card.category, article(name))  # fmt: skip


def testbed(names: Collection[str] = tuple(CARDS)) -> dict[str, list[dict[str, object]]]:
    """Category to its entries."""
    rows: dict[str, list[dict[str, object]]] = {category: [] for category in CATEGORIES}
    for name, card in ((name, card) for name, card in CARDS.items() if name in names):
        entry = {"id": stem(name), "name": card.title, "trigger": [card.triggers], "phrase": phrase(name, card), "concept": judge_phrase(name),
                 "alone": alone(name, card), "url": ""}  # fmt: skip
        rows["background" if card.category == "place" else card.category].append(entry)
    return rows


def write(file: Path, names: Collection[str] = tuple(CARDS)) -> None:
    file.write_text(json.dumps(testbed(names), indent=2) + "\n")
