"""Pictures that AutoLoRA's gates are learned from, drawn by the model itself: each LoRA alone, and pairs, with prompts that name them.

One LoRA's pictures, and those of a style or a place with something else, are drawn by Merge; of two things that stand apart by CLoRA fast,
which gives each a place of its own, so that the gates learn from pictures in which both are there.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from composition.engine import Engine, Event
from composition.prompts import EVERYWHERE
from composition.refusal import Refused
from composition.request import Lora, Request
from composition.training.gates import Rows

PLACES = ("", "in the snow", "in a room", "at night", "on a white background")  # what stands behind
MOST = 5  # LoRAs of a step


class Known(NamedTuple):
    """A LoRA to learn from: how it is loaded, its category and the words that call it."""

    lora: Lora
    category: str
    words: str


class Drawn(NamedTuple):
    """Pictures of some LoRAs. names: theirs; latents: as the denoiser sees them."""

    names: frozenset[str]
    latents: Float[Tensor, "n C H W"]
    prompts: tuple[str, ...]


def prompt_of(some: Sequence[Known], place: str) -> str:
    """A prompt that names these: things first, joined by "and", then places, and styles at the end."""
    things = [known.words for known in some if known.category not in EVERYWHERE]
    where = [known.words for known in some if known.category == "place"] or ([place] if place else [])
    styles = [known.words for known in some if known.category == "style"]
    return ", ".join([" ".join(part for part in (" and ".join(things), *where) if part), *styles]).strip(", ")


def draw(
    engine: Engine, loras: Mapping[str, Known], *, each: int = 8, pairs: int = 40, steps: int = 25, seed: int = 0,
    on_group: Callable[[int, int], object] | None = None, stop: Callable[[], bool] | None = None,
) -> list[Drawn]:  # fmt: skip
    """Groups of `each` pictures: of every LoRA alone, and of `pairs` pairs chosen by `seed`. on_group: (groups drawn, of all).

    A pair that CLoRA fast cannot draw, as of two LoRAs with the same words, is left out. Raises Refused for fewer than two LoRAs.
    """
    if len(loras) < 2:
        raise Refused(f"gates are learned from two LoRAs or more, not from {len(loras)}")
    several = list(combinations(loras, 2))
    random.Random(f"pairs/{seed}").shuffle(several)
    groups = [(name,) for name in loras] + several[:pairs]
    drawn: list[Drawn] = []
    for number, names in enumerate(groups):
        some = [loras[name] for name in names]
        apart = len(some) > 1 and not any(known.category in EVERYWHERE for known in some)
        prompts, latents = [], []
        try:
            for i in range(each):
                if stop is not None and stop():
                    return drawn
                prompts.append(prompt_of(some, PLACES[(number + i) % len(PLACES)]))
                bound = [replace(known.lora, binds=known.words) if apart else known.lora for known in some]
                latents.append(_latents(engine, Request(prompt=prompts[-1], loras=bound, method="clora-fast" if apart else "merge", steps=steps,
                                                        seed=random.Random(f"{seed}/{number}/{i}").randrange(2**32))))
        except Refused:
            if not apart:
                raise
            continue
        drawn.append(Drawn(frozenset(names), torch.cat(latents), tuple(prompts)))
        if on_group is not None:
            on_group(number + 1, len(groups))
    return drawn


def _latents(engine: Engine, request: Request) -> Float[Tensor, "1 C H W"]:
    last: list[Tensor] = []

    def keep(event: Event) -> None:
        last[:] = [event.latents]

    engine.run(request, on_step=keep)
    return last[0].float().cpu()


class FromDrawn:
    """The rows of a step by its number: two to five of the LoRAs on, pictures of one or two of them."""

    def __init__(self, drawn: Sequence[Drawn], loras: Mapping[str, Known], rows: int = 4, seed: int = 0) -> None:
        self.drawn, self.loras, self.rows, self.seed = list(drawn), dict(loras), rows, seed

    def __call__(self, step: int) -> Rows:
        rng = random.Random(f"gates/{self.seed}/{step}")
        first = rng.choice(self.drawn)
        count = min(len(self.loras), rng.randint(max(2, len(first.names)), MOST))
        others = [name for name in self.loras if name not in first.names]
        on = [*sorted(first.names), *rng.sample(others, count - len(first.names))]
        rng.shuffle(on)
        fitting = [group for group in self.drawn if group.names <= set(on)]
        latents, prompts, contrasts = [], [], []
        for i in range(self.rows):
            group = first if i == 0 else rng.choice(fitting)
            picture = rng.randrange(len(group.prompts))
            apart = [other for other in fitting if not other.names & group.names]
            latents.append(group.latents[picture])
            prompts.append(group.prompts[picture])
            contrasts.append(rng.choice(rng.choice(apart).prompts) if apart else "")
        return Rows({name: rng.uniform(0.8, 1.1) for name in on}, torch.stack(latents), prompts, contrasts)
