"""What is written of a LoRA, as short texts: what an encoder learns from in a user's own library, and what a prompt is compared with.

Nothing of it need be true: it is what trainers, uploaders and the user wrote.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float

from retrieval.cards import Card
from retrieval.phrases import telling
from retrieval.training import Lessons

MOST, MOST_TAGS = 24, 12  # texts of one LoRA; tags among them
LETTERS = 200  # of a text; readers of text as CLIP read some 77 tokens
COMMON = 0.05  # a text that more LoRAs share than this share of them says nothing of any

Read = Callable[[Sequence[str]], Float[np.ndarray, "n T"]]


def texts(cards: Iterable[Card]) -> tuple[str, ...]:
    """Of one LoRA's files: titles, names that tell something, trigger words, tags, beginnings of descriptions, frequent words of captions."""
    cards = list(cards)
    lines = [*(card.title for card in cards), *(name for card in cards for name in telling(card.name)), *_triggers(cards), *_tags(cards),
             *(card.description.partition(". ")[0] for card in cards), *(word for card in cards for word in card.words_of("training tags"))]  # fmt: skip
    return tuple({line.casefold(): line for line in (" ".join(line.split())[:LETTERS] for line in reversed(lines)) if line}.values())[::-1][:MOST]


def caption(cards: Iterable[Card]) -> str:
    """Titles (else names that tell something), trigger words and tags of one LoRA's files in a line; "" where there are none."""
    cards = list(cards)
    titles = [card.title for card in cards if card.title] or [name for card in cards for name in telling(card.name)]
    lines = (*titles, *_triggers(cards), *_tags(cards))
    return ", ".join({line.casefold(): line for line in reversed(lines) if line}.values().__reversed__())[:LETTERS]


def lessons(written: Sequence[Sequence[str]], read: Read, directions: Float[np.ndarray, "n D"] | None) -> Lessons:
    """For `training.train`: each LoRA is described by its own texts, but for those that are common to many. directions: zeros where unmeasured."""
    often = Counter(text.casefold() for lines in written for text in lines)
    pairs = [(number, text) for number, lines in enumerate(written) for text in lines if often[text.casefold()] <= max(1, COMMON * len(written))]
    width = np.asarray(read(["a picture"])).shape[1]
    vectors = np.asarray(read([text for _, text in pairs]), np.float32) if pairs else np.zeros((0, width), np.float32)
    return Lessons(torch.arange(len(written)), torch.from_numpy(vectors), torch.tensor([number for number, _ in pairs], dtype=torch.long),
                   None if directions is None else torch.from_numpy(np.asarray(directions, np.float32)))  # fmt: skip


def _triggers(cards: Sequence[Card]) -> list[str]:
    return [word for card in cards for word in card.words_of("header", "sidecar", "user")]


def _tags(cards: Sequence[Card]) -> list[str]:
    return [tag for card in cards for tag in card.tags[:MOST_TAGS]]
