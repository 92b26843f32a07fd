"""The cases of one evaluation: of its manifest, or drawn from its testbed; and those that weights are tuned on."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from app.errors import sentence
from app.evaluation import choice, distractors, manifest, testbed
from app.evaluation.cases import Case, CollectedCases, Problem, clipped
from app.evaluation.config import EvaluationConfig
from app.suggestions import opened
from composition import Receipt
from composition.loras import library, reader

PILOTS = 8  # sets of each size that weights are tried on, with noise that is used for nothing else


class Collector:
    """Reads a config's manifest, or draws from its testbed. A LoRA whose file is missing is left out with its sets."""

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self.lost: dict[str, str] = {}  # LoRA to why it is left out

    def cases(self) -> CollectedCases:
        """All of them, and the problems of those that there are not."""
        config = self.config
        if config.manifest is not None:
            return manifest.read(config.manifest, self._inspect, config.like.model)
        cases = [case for size in self._sizes for case in self._of_size(size, config.sets, config.seed, config.seeds)]
        problems = [Problem(f"LoRA {name}", f"{why}; every set with it is left out") for name, why in self.lost.items()]
        return CollectedCases(self._chosen(cases), problems)

    def pilots(self, size: int) -> list[Case]:
        """Cases to try weights on, of other sets with other noise."""
        cases = [case for each in self._sizes for case in self._of_size(each, PILOTS, self.config.seed + 1, 1, pilot=True) if case.size == size]
        return [case for case in self._chosen(cases) if case.request and case.request.loras]

    @property
    def _sizes(self) -> Sequence[int]:
        """Sizes of sets, or numbers of distractors."""
        return self.config.distractors or self.config.sizes

    def _of_size(self, size: int, sets: int | None, seed: int, seeds: int, *, pilot: bool = False) -> list[Case]:
        config = self.config
        how: dict[str, Any] = {"weight": config.weight, "prefix": config.prefix, "pilot": pilot}
        if config.distractors:
            return distractors.cases(distractors.drawn(self._there, size, sets or 0, seed, config.of), seeds, config.like, self._there, **how)
        chosen = [each for each in testbed.drawn(self._table, size, sets, seed, config.of) if not [entry for entry in each if self._missing(entry.id)]]
        return testbed.cases(chosen, seeds, config.like, boxes=config.boxes, **how)

    def _chosen(self, cases: Sequence[Case]) -> list[Case]:
        if self.config.choose != choice.RETRIEVAL or not cases:
            return list(cases)
        return choice.by_retrieval(cases, self._table, self._library, self._find, weight=self.config.weight)

    @cached_property
    def _library(self) -> Any:
        return opened(self.config.like.model, self.config.place.folders, self.config.judge)

    @cached_property
    def _table(self) -> dict[str, list[testbed.Entry]]:
        return testbed.read(self.config.testbed)

    @cached_property
    def _there(self) -> Mapping[str, Sequence[testbed.Entry]]:
        """The table without the LoRAs that are missing."""
        return {category: [entry for entry in rows if not self._missing(entry.id)] for category, rows in self._table.items()}

    def _missing(self, name: str) -> bool:
        if name in self.lost:
            return True
        try:
            self._find(name)
        except Exception as error:  # a name too long for the system is one LoRA's trouble too
            self.lost[name] = clipped(sentence(error))
            return True
        return False

    def _find(self, name: str) -> Path:
        return library.find(name, self.config.like.model, self.config.place.folders)

    def _inspect(self, source: str) -> Receipt | None:
        return reader.inspect(self._find(source))
