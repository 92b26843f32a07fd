"""What is drawn for a training, from (plan, concept, step) alone: a concept in company draws what it draws alone."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from composition.training.noise import Noise
from composition.training.plan import Concept, Learned, Plan, Schedule

GOLDEN = 0.6180339887498949


class Draws(NamedTuple):
    """All that is small, for every step at once. Rows lie concept after concept."""

    pictures: Int[Tensor, "steps rows"]  # of all concepts' pictures, one after the other
    times: Num[Tensor, "steps rows"]
    kept: Bool[Tensor, "steps rows"]  # the prompt lacks the concept, and the base's own prediction is the goal
    prompts: Int[Tensor, "steps rows"]  # of `words`
    words: list[str]


def draws(concepts: Sequence[Concept], plan: Plan, noise: Noise) -> Draws:
    """Pictures, times and prompts of every row of every step."""
    parts: list[tuple[Tensor, ...]] = []
    numbers: dict[str, int] = {}
    first = 0
    for concept in concepts:
        generator = torch.Generator().manual_seed(seed_of(plan, concept, "rows", 63))
        shape = (plan.steps, plan.batch)
        pick = torch.randint(len(concept.prompts), shape, generator=generator)
        times = noise.times(plan.steps * plan.batch, plan.noise, generator).view(shape)
        other = torch.randint(max(1, len(concept.others)), shape, generator=generator)
        empty = torch.rand(shape, generator=generator) < plan.empty
        # Shares come out even over any few steps.
        place = (torch.arange(plan.steps * plan.batch, dtype=torch.float64) * GOLDEN % 1.0).view(shape)
        kept = (place < plan.keep) & bool(concept.others)
        own, others = (torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
                       for prompts in (concept.prompts, concept.others or ("",)))  # fmt: skip
        nothing = torch.tensor(numbers.setdefault("", len(numbers)))
        prompts = torch.where(kept, others[other], torch.where(empty, nothing, own[pick]))
        parts.append((pick + first, times, kept, prompts))
        first += len(concept.prompts)
    pictures, times, kept, prompts = (torch.cat(same, 1) for same in zip(*parts, strict=True))
    return Draws(pictures, times, kept, prompts, list(numbers))


class Fresh:
    """The noise of every step, drawn on the processor: a generator per concept that can begin at any step."""

    def __init__(self, concepts: Sequence[Learned], plan: Schedule, rows: int) -> None:
        """rows: of each concept in a step."""
        self.keys = [seed_of(plan, concept, "noise", 128) for concept in concepts]
        self.rows = rows

    def draw(self, step: int, shape: Sequence[int], dtype: torch.dtype) -> Float[Tensor, "rows *shape"]:
        """Normal numbers for each row. dtype: float32 or float64."""
        held = np.empty((len(self.keys), self.rows, *shape), np.float64 if dtype == torch.float64 else np.float32)
        for key, rows in zip(self.keys, held, strict=True):
            generator = np.random.Generator(np.random.Philox(key=key, counter=step << 128))
            generator.standard_normal(dtype=held.dtype.type, out=rows)
        return torch.from_numpy(held).flatten(0, 1)


def seed_of(plan: Schedule, concept: Learned, use: str, bits: int) -> int:
    """A number of so many bits that follows from the plan's seed, the name of what is learned and what it is for."""
    return random.Random(f"{plan.seed}/{concept.name}/{use}").getrandbits(bits)
