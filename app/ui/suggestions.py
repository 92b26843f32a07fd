"""What the page suggests while one types: LoRAs of the library that the prompt calls for, with the reason."""

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from app.terminal import printable
from app.ui.cards import Card
from composition import Refused

if TYPE_CHECKING:
    from pathlib import Path

    from app.lora_library import Library
    from composition import Engine
    from retrieval.cards import Card as Known
    from retrieval.suggest import Suggestion

MOST_LETTERS = 2_000  # of a prompt that is searched with


class Suggestions:
    """The library of the page's engine; it is brought up to date by a thread of its own, and until then nothing is suggested."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._library: Library | None = None
        self._lock = threading.Lock()
        self.state = "They are being indexed: suggestions come later."
        threading.Thread(target=self._prepare, name="library", daemon=True).start()

    def _prepare(self) -> None:
        from app.lora_library import Library

        try:
            library = Library(self._engine.name, self._engine.folders)
            library.refresh()
            library.suggest("a picture to prepare with")
            self.state = f"{len(library.catalogue.cards())} files are indexed."
            self._library = library
        except Exception as error:  # a page without suggestions is a page
            logging.getLogger("medley").info("no suggestions: %s", error)
            self.state = "They could not be indexed: nothing is suggested."

    def known(self) -> "dict[Path, Known]":
        """What the catalogue has of each file; nothing until it was read."""
        return {card.path: card for card in self._library.catalogue.cards()} if self._library else {}

    def of(self, prompt: str, shelf: Mapping[str, Card]) -> list[dict[str, Any]]:
        """For the cards: key, title, what it is for, why, the trigger word that the prompt lacks, and the weight to begin with."""
        if self._library is None or not prompt.strip():
            return []
        with self._lock:
            try:
                suggestions = self._library.suggest(prompt[:MOST_LETTERS])
            except Refused:
                return []
            by_path = {self._engine.find(card.source): card for card in shelf.values() if not card.trouble} if suggestions else {}
            return [_shown(card, each) for each in suggestions if (card := next((by_path[path] for path in self._library.paths(each) if path in by_path), None))]


def _shown(card: Card, suggestion: "Suggestion") -> dict[str, Any]:
    """No path of this machine."""
    return {"key": card.key, "title": card.title, "for": printable(suggestion.phrase), "why": printable("; ".join(reason.text() for reason in suggestion.reasons)),
            "word": printable(suggestion.trigger), "weight": suggestion.weight}  # fmt: skip
