"""What the page opens with, and what one click fills in: prompts with LoRAs and a method that go together, where their LoRAs are there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.ui.cards import Card


@dataclass(frozen=True)
class Example:
    """loras: by name, with weights."""

    title: str
    prompt: str
    loras: Mapping[str, float]
    method: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """As the page has LoRAs."""
        return [{"key": key, "weight": weight, "on": True, "binds": "", "blocks": ""} for key, weight in self.loras.items()]


EXAMPLES = (
    Example("Two animals", "a wolf and an owl in the forest", {"wolf": 1.0, "owl": 1.0}, "clora-fast"),
    Example("Animal in a style", "a raccoon on the moon, ink drawing", {"raccoon": 1.0, "ink": 0.8}, "merge"),
    Example("Dressed up", "a dragon wearing a top hat in candy land", {"dragon": 1.0, "top_hat": 1.0, "candy": 0.8}, "clora-fast"),
    Example("In the wood", "an owl in the autumn wood, ink drawing", {"owl": 1.0, "autumn": 0.8, "ink": 0.7}, "merge"),
)


def offered(shelf: Mapping[str, Card]) -> Sequence[Example]:
    """Those whose LoRAs are all on the shelf."""
    return [each for each in EXAMPLES if all(key in shelf and not shelf[key].trouble for key in each.loras)]
