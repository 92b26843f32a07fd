"""The cases of an evaluation: prompts with their noise and the concepts that a picture of them should show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from composition import Lora, Request

Key = tuple[str, int, int]


@dataclass(frozen=True)
class ExpectedConcept:
    """One thing a picture should show.

    name: the LoRA's, or the phrase. phrase: what the judge looks for ("a raccoon"). category: as a Lora's. alone: a prompt for
    it by itself, "" for none. references: pictures of it from the user.
    """

    name: str
    phrase: str
    category: str = ""
    alone: str = ""
    references: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Case:
    """One prompt with one noise. Every method answers it with the same seed.

    group: what is resampled as one (a set of LoRAs, a prompt): pictures of one group are not independent. seed: number of
    the seed within its group. text: what CLIPScore compares with. request: as it was written, method included. method: how the request or
    the picture came to be, "" when it is not known. picture: a picture that is there already. line: of the manifest. distractors: concepts of
    LoRAs that are in the request and not in its prompt. own: the set's own LoRAs, where the request has those that were chosen in their
    place. steps: of every method, where several numbers of steps are compared, else 0.
    """

    group: str
    seed: int
    text: str
    concepts: tuple[ExpectedConcept, ...] = ()
    request: Request | None = None
    method: str = ""
    picture: Path | None = None
    line: int = 0
    distractors: tuple[ExpectedConcept, ...] = ()
    own: tuple[Lora, ...] = ()
    steps: int = 0

    @property
    def size(self) -> int:
        """Number of LoRAs of the set; of concepts where there is no request."""
        return len(self.own or self.request.loras) if self.request else len(self.concepts)

    def lora(self, name: str) -> Lora | None:
        """The LoRA of a concept's name, of the set or of the request; None where there is none."""
        request = replace(self.request, loras=self.own) if self.request and self.own else self.request
        return dict(zip(request.names, request.loras, strict=True)).get(name) if request else None

    @property
    def key(self) -> Key:
        """What pairs the pictures of two methods."""
        return self.group, self.seed, self.steps


def key(row: Mapping[str, Any]) -> Key:
    """The key of the case that a scored row is of."""
    return row["group"], row["number"], row.get("steps") or 0


def at_steps(cases: Sequence[Case], steps: Sequence[int]) -> list[Case]:
    """Every case with each number of steps and the same noise; as they are where there are not several."""
    if len(steps) < 2:
        return list(cases)
    return [replace(case, steps=number, request=replace(case.request, steps=number)) if case.request and not case.picture else case
            for case in cases for number in steps]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something left out, and why. line: of the manifest, 0 for none."""

    where: str
    why: str
    line: int = 0

    def __str__(self) -> str:
        return f"line {self.line}: {self.why}" if self.line else f"{self.where}: {self.why}"


def clipped(words: str, most: int = 400) -> str:
    """Words of which a stranger's file may have chosen the length."""
    return words if len(words) <= most else f"{words[: most // 2]}...{words[-most // 2 :]}"


@dataclass
class CollectedCases:
    """The cases that can be evaluated, and the problems of those that cannot."""

    cases: list[Case] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
