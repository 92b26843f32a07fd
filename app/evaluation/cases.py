"""The cases of an evaluation: prompts with their noise and the concepts that a picture of them should show."""

from dataclasses import dataclass, field
from pathlib import Path

from composition import Request


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
    the picture came to be, "" when it is not known. picture: a picture that is there already. line: of the manifest.
    """

    group: str
    seed: int
    text: str
    concepts: tuple[ExpectedConcept, ...] = ()
    request: Request | None = None
    method: str = ""
    picture: Path | None = None
    line: int = 0

    @property
    def size(self) -> int:
        """Number of LoRAs asked for; of concepts where there is no request."""
        return len(self.request.loras) if self.request else len(self.concepts)

    @property
    def key(self) -> tuple[str, int]:
        """What pairs the pictures of two methods."""
        return self.group, self.seed


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
