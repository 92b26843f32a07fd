"""Which concepts of a request its picture shows, by the bundled judge: every LoRA's, and those that the prompt names besides.

The judge has thresholds for pictures of the bundled models alone (`retrieval.judge`), so on other models nothing is judged; nor is a LoRA
for whose trigger words it has none.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from PIL import Image

from composition import Receipt, Refused, Request, prompts
from composition.bundled import BUNDLES

if TYPE_CHECKING:
    from retrieval.judge import Judge

_opening = threading.Lock()


@dataclass(frozen=True)
class Verdict:
    """On one concept. lora: whose it is, "" where the prompt alone names it. phrase: what was looked for, "" where the judge knows none. present: None where it is
    not judged."""

    lora: str
    phrase: str
    present: bool | None

    @property
    def name(self) -> str:
        return self.lora or self.phrase

    @property
    def lost(self) -> bool:
        """Whether a LoRA's concept is not found."""
        return bool(self.lora) and self.present is False

    def text(self) -> str:
        """Its name, and how it stands."""
        return f"{self.name} {'not judged' if self.present is None else 'found' if self.present else 'not found'}"


def verdicts(request: Request, receipts: Sequence[Receipt], picture: Image.Image) -> list[Verdict]:
    """On the concepts of a settled request, whose receipts are in the order of its LoRAs; LoRAs that are off have none. Empty where the model has no judge."""
    if request.model not in BUNDLES:
        return []
    try:
        judge = _judge()
    except Refused:  # open-clip is not installed
        return []
    triggers = {name: lora.triggers or receipt.triggers for name, lora, receipt in zip(request.names, request.loras, receipts, strict=True) if name in request.composed}
    phrases = {name: phrase(words, judge.thresholds) for name, words in triggers.items()}
    known = set(phrases.values())
    spoken = [each for each in judge.thresholds if each not in known and prompts.says(request.prompt, each)]
    looked_for = [each for each in (*phrases.values(), *spoken) if each]
    with _opening:  # its cache of texts is nobody's at the same time
        present = dict(zip(looked_for, judge.present([picture], looked_for)[0].tolist(), strict=True)) if looked_for else {}
    return [Verdict(name, each, present.get(each)) for name, each in phrases.items()] + [Verdict("", each, present[each]) for each in spoken]


def phrase(triggers: Iterable[str], thresholds: Mapping[str, object]) -> str:
    """What the judge calls the thing that these words stand for; "" where it knows none."""
    spellings = (f"{article}{word.strip().lower()}" for word in triggers for article in ("", "a ", "an "))
    return next((each for each in spellings if each in thresholds), "")


def lost(verdicts: Iterable[Verdict]) -> str:
    """A sentence on the LoRAs whose concepts the judge does not find, "" where there is none."""
    names = [f"{each.lora} ({each.phrase})" for each in verdicts if each.lost]
    return f"the judge does not find {', '.join(names)} in the picture" if names else ""


def _judge() -> "Judge":
    with _opening:
        return _opened()


@cache
def _opened() -> "Judge":
    from retrieval.judge import Judge

    return Judge.open()
