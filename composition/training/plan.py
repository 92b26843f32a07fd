"""What to learn and how: Plan and Concept, checked when they are built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from composition.refusal import Refused

# Layers by what they are, as pieces of their paths; "text" is every projection of the text encoders.
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    "projection": ("proj_in", "proj_out"),
    "convolution": ("conv1", "conv2", "conv_shortcut"),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}


@runtime_checkable
class Schedule(Protocol):
    """What every plan says of its steps."""

    @property
    def seed(self) -> int: ...

    @property
    def rate(self) -> float: ...

    @property
    def steps(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def warm(self) -> int: ...

    @property
    def decay(self) -> float: ...


@runtime_checkable
class Learned(Protocol):
    """What is learned, as its training knows it: its name, and what it is learned from in any words."""

    @property
    def name(self) -> str: ...

    @property
    def origin(self) -> str: ...


@dataclass(frozen=True)
class Plan:
    """How to train. rate: peak of AdamW, warmed up, then a cosine down to a tenth. batch: rows per concept and step.

    noise: None draws times as is usual for the family; (centre, width) draws ln sigma (of a flow: its logit) from that
    normal distribution, besides a tenth evenly. empty: the share of prompts replaced by "", which keeps guidance working. keep: the share of rows that have one
    of a concept's `others` for a prompt and the base's own answer for a goal, so that what is learned stays with its
    trigger. half: bfloat16 autocast.
    """

    rank: int = 8
    alpha: float | None = None
    rate: float = 1e-3
    steps: int = 500
    batch: int = 8
    targets: tuple[str, ...] = ("attention", "feed_forward")
    noise: tuple[float, float] | None = None
    empty: float = 0.1
    keep: float = 0.0
    warm: int = 25
    decay: float = 0.0
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        strange = set(self.targets) - set(TARGETS)
        if strange or not self.targets:
            raise Refused(f"targets {sorted(strange)} are unknown; choose from {', '.join(TARGETS)}")
        if min(self.rank, self.steps, self.batch) < 1:
            raise Refused(f"rank, steps and batch must be at least 1, not {self.rank}, {self.steps}, {self.batch}")
        if not (0 <= self.empty < 1 and 0 <= self.keep < 1):
            raise Refused(f"empty and keep are shares from 0 to below 1, not {self.empty:g} and {self.keep:g}")
        if not 0 < self.rate < 1:
            raise Refused(f"the rate must lie between 0 and 1, not {self.rate:g}; 1e-4 is usual")


@dataclass(frozen=True, eq=False)
class Concept:
    """What one adapter learns from: latents (n, C, H, W) as the denoiser sees them, and a prompt for each.

    metadata: for the file's header (title, category, trigger_words, base, ...). origin: what the latents were made
    from, in any words; a checkpoint is only continued with the same. others: prompts that have nothing to do with it.
    """

    name: str
    latents: Float[Tensor, "n C H W"]
    prompts: Sequence[str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    others: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.prompts) or not len(self.prompts):
            raise Refused(f"{self.name}: {len(self.latents)} pictures and {len(self.prompts)} prompts; give one each")
