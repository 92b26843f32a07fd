"""The rows of a training step, with the same number of operations on the device however many concepts there are."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from composition.adapters import Adapters
from composition.backbones.base import Backbone
from composition.loop import Conditioning
from composition.training import noise
from composition.training.draws import Fresh, draws
from composition.training.encodings import Encodings
from composition.training.plan import Concept, Plan


class Batch(NamedTuple):
    """One step's rows, adapter after adapter. goal: what the denoiser should predict, 0 in `base_rows`."""

    noisy: Float[Tensor, "rows C H W"]
    t: Num[Tensor, "rows"]
    goal: Float[Tensor, "rows C H W"]
    cond: Conditioning  # (1, rows, ...)
    count: int  # adapters
    base_rows: "BaseRows | None"


class BaseRows(NamedTuple):
    """Rows whose goal is the prediction of the base without adapters."""

    rows: Int[Tensor, "n"]
    cond: Conditioning  # (1, n, ...)


class Rows(NamedTuple):
    """A step's rows in main memory, which a device can fetch without making the program wait."""

    noisy: Float[Tensor, "rows C H W"]
    t: Num[Tensor, "rows"]
    goal: Float[Tensor, "rows C H W"]
    prompts: Int[Tensor, "rows"]
    base_rows: Int[Tensor, "n"]
    base_prompts: Int[Tensor, "n"]


class Batches:
    """Draws the rows of a step.

    Most rows are a picture with its prompt. Some (Plan.keep) have a prompt without the concept, and the base's own
    prediction as their goal. Prompts are encoded before the first step; those of text encoders in training, in every step.
    ahead: prepare the next step's rows in a thread of their own while the device computes (None: where there is one).
    """

    def __init__(
        self, backbone: Backbone, adapters: Adapters, concepts: Sequence[Concept], plan: Plan, *, ahead: bool | None = None
    ) -> None:
        self.backbone, self.adapters, self.plan, self.count = backbone, adapters, plan, len(concepts)
        self.ahead = backbone.device.type != "cpu" if ahead is None else ahead
        self.noise = noise.of(backbone.scheduler)
        self.dtype = None if plan.half else backbone.dtype  # autocast takes single precision as it is
        self.text = "text" in plan.targets
        self.latents = torch.cat([concept.latents.cpu() for concept in concepts])
        self.fresh, self.drawn = Fresh(concepts, plan, plan.batch), draws(concepts, plan, self.noise)
        numbers = self.drawn.prompts
        used = (numbers[self.drawn.kept] if self.text else numbers).unique()
        self.encodings = Encodings(backbone, [self.drawn.words[number] for number in used.tolist()])
        self.place = torch.zeros(len(self.drawn.words), dtype=torch.long)  # of a word among the encodings
        self.place[used] = torch.arange(len(used))

    def stream(self, first: int) -> Generator[Batch]:
        """The batches of step `first` and those after it."""
        steps = range(first, self.plan.steps)
        if not self.ahead:
            yield from map(self.draw, steps)
            return
        with ThreadPoolExecutor(1, "rows") as worker:
            coming = worker.submit(self._rows, first)
            for step in steps:
                rows = coming.result()
                if step + 1 < self.plan.steps:
                    coming = worker.submit(self._rows, step + 1)
                yield self._on_device(rows, step)

    def draw(self, step: int) -> Batch:
        return self._on_device(self._rows(step), step)

    def _rows(self, step: int) -> Rows:
        latents = self.latents.index_select(0, self.drawn.pictures[step])
        t, kept, prompts = self.drawn.times[step], self.drawn.kept[step], self.drawn.prompts[step]
        fresh = self.fresh.draw(step, latents.shape[1:], latents.dtype).to(latents.dtype)
        noisy, goal = self.noise.mix(latents, fresh, t)
        base_rows = kept.nonzero()[:, 0]
        rows = Rows(noisy.to(self.dtype or noisy.dtype), t, goal.masked_fill(kept.view(-1, 1, 1, 1), 0.0),
                    self.place[prompts], base_rows, self.place[prompts[base_rows]])  # fmt: skip
        return Rows(*(value.pin_memory() for value in rows)) if self.backbone.device.type == "cuda" else rows

    def _on_device(self, rows: Rows, step: int) -> Batch:
        noisy, t, goal, base_rows = (v.to(self.backbone.device, non_blocking=True) for v in (rows.noisy, rows.t, rows.goal, rows.base_rows))
        base = BaseRows(base_rows, self.encodings.rows(rows.base_prompts)) if len(rows.base_rows) else None
        cond = self._read(step) if self.text else self.encodings.rows(rows.prompts)
        return Batch(noisy, t, goal, cond, self.count, base)

    def _read(self, step: int) -> Conditioning:
        """All rows' prompts in one batch, each by its own adapter, with the gradient on."""
        with self.adapters.in_turn(self.plan.batch, text=True):
            return self.backbone.encode([self.drawn.words[number] for number in self.drawn.prompts[step].tolist()], None)
