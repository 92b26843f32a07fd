"""What an evaluation does: everything that the user said, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app import engines
from app.evaluation import mllm, statistics
from composition import Request


@dataclass(frozen=True)
class EvaluationConfig:
    """What the user asked for. testbed or manifest: one of the two. sets None: all. like: settings of every picture. of: a category
    of which all LoRAs of a set are. boxes: they have regions side by side. distractors: numbers of LoRAs that are loaded besides the one asked for, in
    place of sets. choose: who chooses the LoRAs of a set's prompt. steps: several numbers of steps to compare; none where like has the only one."""

    folder: Path
    like: Request
    testbed: str = ""
    manifest: Path | None = None
    methods: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: tuple[int, ...] = (2, 3, 4, 5)
    sets: int | None = 24
    of: str = ""
    boxes: bool = False
    distractors: tuple[int, ...] = ()
    choose: str = "set"
    steps: tuple[int, ...] = ()
    seeds: int = 3
    limit: int | None = None
    weight: float = 1.0
    prefix: str = ""
    tune: tuple[str, ...] = ()
    equal: bool = True
    references: int = 4
    judge: str = "pocket"
    scale: str = "100"
    resamples: int = statistics.RESAMPLES
    seed: int = 0
    place: engines.EngineOptions = engines.EngineOptions()
    endpoint: mllm.Endpoint | None = None
    pairs: int = 50
