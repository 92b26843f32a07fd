"""The rows of a training step: which pictures, how much noise, and what they read, from (seed, concept, step) alone."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from composition.adapters import Adapters
from composition.backbones.base import Backbone
from composition.loop import Conditioning
from composition.training import noise
from composition.training.plan import Concept, Plan

GOLDEN = 0.6180339887498949


class Batch(NamedTuple):
    """One step's rows, adapter after adapter. goal: what the denoiser should answer, less what the base says in `asked`."""

    noisy: Float[Tensor, "rows C H W"]
    t: Num[Tensor, "rows"]
    goal: Float[Tensor, "rows C H W"]
    cond: Conditioning  # (1, rows, ...)
    count: int  # adapters
    asked: "Asked | None"


class Asked(NamedTuple):
    """Rows whose goal is what the base without adapters says of them."""

    rows: Int[Tensor, "n"]
    cond: Conditioning  # (1, n, ...)


class Batches:
    """Draws the rows of a step.

    Most rows are a picture with its prompt. Some (Plan.keep) have a prompt without the concept, and the base's own
    answer for a goal.
    """

    def __init__(self, backbone: Backbone, adapters: Adapters, concepts: Sequence[Concept], plan: Plan) -> None:
        self.backbone, self.adapters, self.concepts, self.plan = backbone, adapters, concepts, plan
        self.noise = noise.of(backbone.scheduler)
        self.dtype = None if plan.half else backbone.dtype  # autocast takes single precision as it is
        self.read: dict[str, dict[str, Tensor]] = {}

    def draw(self, step: int) -> Batch:
        parts = [self._rows(concept, step) for concept in self.concepts]
        device, size = self.backbone.device, self.plan.batch
        noisy, t, goal = (torch.cat(same).to(device) for same in zip(*(part[:3] for part in parts), strict=True))
        values = [self._encoded(k, part[3]) for k, part in enumerate(parts)]
        cond = Conditioning({key: torch.cat([v[key] for v in values], 1) for key in values[0]})
        asked = [(k * size + row, prompt) for k, part in enumerate(parts) for row, prompt in part[4]]
        base = None
        if asked:
            rows, prompts = zip(*asked, strict=True)
            base = Asked(torch.tensor(rows, device=device), Conditioning(self._bare(prompts)))
        return Batch(noisy.to(self.dtype or noisy.dtype), t, goal, cond, len(parts), base)

    def _rows(
        self, concept: Concept, step: int
    ) -> tuple[Tensor, Tensor, Tensor, list[str], list[tuple[int, str]]]:
        """One concept's noisy latents, times, goals, prompts, and (row, prompt) of what the base is asked."""
        name = f"{self.plan.seed}/{concept.name}/{step}"
        rng = random.Random(name)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        size = self.plan.batch
        pick = torch.randint(len(concept.prompts), (size,), generator=generator)
        latents = concept.latents[pick].cpu()
        fresh = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
        t = self.noise.times(size, self.plan.noise, generator)
        noisy, goal = self.noise.mix(latents, fresh, t)
        prompts, asked = [], []
        for row in range(size):
            place = (step * size + row) * GOLDEN % 1.0  # shares come out even over any few steps
            if concept.others and place < self.plan.keep:
                prompts.append(rng.choice(concept.others))
                goal[row] = 0
                asked.append((row, prompts[-1]))
            else:
                prompts.append("" if rng.random() < self.plan.empty else concept.prompts[int(pick[row])])
        return noisy, t, goal, prompts, asked

    def _encoded(self, k: int, prompts: list[str]) -> dict[str, Tensor]:
        """(1, batch, ...) tensors. With a text part, read anew with the gradient on; else each prompt once."""
        if "text" in self.plan.targets:
            self.adapters.use_text({self.concepts[k].name: 1.0})
            try:
                return dict(self.backbone.encode(prompts, None).values)
            finally:
                self.adapters.use_text({})
        return self._bare(prompts)

    def _bare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The same, read by the base alone."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.read:
                with torch.no_grad():
                    self.read[prompt] = dict(self.backbone.encode([prompt], None).values)
        return {key: torch.cat([self.read[p][key] for p in prompts], 1) for key in self.read[prompts[0]]}
