"""What a condition LoRA is learned from, and how: pairs of a picture and its condition in buckets of one size, and the draws of every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from composition.loras.condition import Settings
from composition.refusal import Refused
from composition.training.draws import seed_of
from composition.training.noise import Noise


@dataclass(frozen=True)
class ConditionPlan:
    """How to train a condition LoRA. rate, warm, decay, noise, half: as in Plan. alpha None is the rank.

    empty: the share of prompts replaced by "": what is to be drawn must then be read from the condition. drop: the share of rows whose
    condition is a blank picture and whose goal is the base's own prediction, so that an empty picture asks for nothing. (A row without
    any condition would teach nothing: the base is still, and all that learns is the condition's own stream.) batch: pairs of a step.
    views: noisy versions of each pair in a step; they read one bank, which costs less than as many pairs.
    """

    rank: int = 16
    alpha: float | None = None
    rate: float = 1e-4
    steps: int = 1000
    batch: int = 1
    views: int = 1
    noise: tuple[float, float] | None = None
    empty: float = 0.1
    drop: float = 0.1
    warm: int = 25
    decay: float = 0.0
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.steps, self.batch, self.views) < 1:
            raise Refused(f"rank, steps, batch and views must be at least 1, not {self.rank}, {self.steps}, {self.batch}, {self.views}")
        if not (0 <= self.empty < 1 and 0 <= self.drop < 1):
            raise Refused(f"empty and drop are shares from 0 to below 1, not {self.empty:g} and {self.drop:g}")
        if not 0 < self.rate < 1:
            raise Refused(f"the rate must lie between 0 and 1, not {self.rate:g}; 1e-4 is usual")


@dataclass(frozen=True, eq=False)
class Bucket:
    """Pairs whose pictures have one size: latents of the pictures and of their conditions, as the denoiser sees them, and a prompt for each."""

    latents: Float[Tensor, "n C H W"]
    conditions: Float[Tensor, "n C h w"]
    prompts: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.latents) == len(self.conditions) == len(self.prompts) > 0:
            raise Refused(f"{len(self.latents)} pictures, {len(self.conditions)} conditions and {len(self.prompts)} prompts; give one of each")


@dataclass(frozen=True, eq=False)
class Pairs:
    """All that one condition LoRA learns from. A step takes its rows from one bucket, a large one more often.

    settings: what its file says of how a picture is read. blank: the latents of a condition picture with nothing in it. words: further ones of the
    file's header. origin: what the latents were made from, in any words; a checkpoint is only continued with the same.
    """

    name: str
    settings: Settings
    buckets: Sequence[Bucket]
    blank: Float[Tensor, "C h w"]
    words: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.buckets:
            raise Refused(f"{self.name}: there are no pairs to learn from")
        if len({(tuple(bucket.conditions.shape[1:]), tuple(self.blank.shape)) for bucket in self.buckets}) > 1:
            raise Refused(f"{self.name}: all condition pictures must have one size")


class PairDraws(NamedTuple):
    """All that is small, for every step at once, from (plan, name, step) alone."""

    bucket: Int[Tensor, "steps"]
    pairs: Int[Tensor, "steps batch"]  # of the step's bucket
    times: Num[Tensor, "steps batch views"]
    blank: Bool[Tensor, "steps batch"]  # the condition is the blank one, and the base's own prediction is the goal
    prompts: Int[Tensor, "steps batch"]  # of `words`
    words: list[str]


def pair_draws(pairs: Pairs, plan: ConditionPlan, noise: Noise) -> PairDraws:
    """Buckets, pairs, times and prompts of every row of every step."""
    generator = torch.Generator().manual_seed(seed_of(plan, pairs, "rows", 63))
    shape = (plan.steps, plan.batch)
    sizes = torch.tensor([len(bucket.prompts) for bucket in pairs.buckets])
    bucket = torch.multinomial(sizes.double(), plan.steps, replacement=True, generator=generator)
    pick = (torch.rand(shape, generator=generator, dtype=torch.float64) * sizes[bucket, None]).long()
    times = noise.times(plan.steps * plan.batch * plan.views, plan.noise, generator).view(*shape, plan.views)
    empty = torch.rand(shape, generator=generator) < plan.empty
    blank = torch.rand(shape, generator=generator) < plan.drop
    numbers: dict[str, int] = {}
    own = torch.tensor([numbers.setdefault(prompt, len(numbers)) for part in pairs.buckets for prompt in part.prompts])
    nothing = torch.tensor(numbers.setdefault("", len(numbers)))
    first = sizes.cumsum(0) - sizes
    prompts = torch.where(empty, nothing, own[first[bucket, None] + pick])
    return PairDraws(bucket, pick, times, blank, prompts, list(numbers))
