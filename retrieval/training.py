"""Training of the transformer (`encode`): LoRAs beside their captions and the directions in which they move pictures, all of one base.

Multi-positive InfoNCE with a learned temperature, to captions and to directions: of all captions (directions) those of the LoRA's own concept
should be nearest, and of all LoRAs those of the caption's. The directions, measured on pictures (CARLoS, arXiv 2512.08826), are a teacher: in use
no picture is needed. A LoRA is never seen twice alike: strengths by block vary, layers are left out, two LoRAs are added.
"""

import errno
import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from composition import atomic
from composition.refusal import Refused
from retrieval.encode import Encoder, Settings
from retrieval.probes import Updates
from retrieval.tokens import Tokens

HOTTEST = 100.0  # the largest factor on a cosine


@dataclass(frozen=True)
class Plan:
    """captions, directions, pull: weights of the three losses; pull is of 1 - cosine with the direction, which InfoNCE only orders.

    mix: the share of LoRAs that have another one added. drop: the share of layers left out. spread: the deviation of the log of a block's strength.
    """

    seed: int = 0
    steps: int = 1000
    batch: int = 128
    rate: float = 1e-3
    decay: float = 0.05
    warm: int = 50
    temperature: float = 0.07
    captions: float = 1.0
    directions: float = 1.0
    pull: float = 0.5
    mix: float = 0.3
    drop: float = 0.2
    spread: float = 0.2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2 or not 0 <= self.mix <= 1 or not 0 <= self.drop < 1 or not 0 <= self.dropout < 1:
            raise Refused("a plan needs at least 1 step, a batch of 2, and shares from 0 to 1")
        if not (self.rate > 0 and self.temperature > 0 and self.warm >= 1):
            raise Refused("a plan's rate and temperature must be above 0, its warm-up at least 1 step")


@dataclass(frozen=True, eq=False)
class Lessons:
    """What n LoRAs are. groups: LoRAs of the same number are of one concept and share its captions; numbers from 0.

    captions: the judge's text vectors; of: the group that each describes. directions: how each LoRA moves the judge's picture vectors, zeros where
    that was not measured; None for none.
    """

    groups: Int[Tensor, " n"]
    captions: Float[Tensor, "c T"]
    of: Int[Tensor, " c"]
    directions: Float[Tensor, "n D"] | None = None


class Losses(nn.Module):
    """The temperatures, and the map from the judge's picture vectors; only training has them."""

    def __init__(self, plan: Plan, pictures: int, dimension: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.full((2,), -math.log(plan.temperature)))
        self.translate = nn.Linear(pictures, dimension, bias=False)
        nn.init.zeros_(self.translate.weight)
        self.dimension = dimension

    def scale(self, index: int) -> Float[Tensor, ""]:
        return self.scales[index].exp().clamp(max=HOTTEST)

    def directions(self, measured: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        measured = F.normalize(measured, dim=-1)
        return F.normalize(F.pad(measured, (0, self.dimension - measured.shape[1])) + self.translate(measured), dim=-1)


def contrast(logits: Float[Tensor, "n m"], targets: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Multi-positive InfoNCE of both directions. targets: how much of row i belongs to column j, 0 for nothing.

    Rows and columns without a target only stand among those that others are told from. 0 without any.
    """
    losses = [logits.new_zeros(())]
    for scores, wanted in ((logits, targets), (logits.T, targets.T)):
        total = wanted.sum(1, keepdim=True)
        rows = total[:, 0] > 0
        if rows.any():
            losses.append(-(wanted[rows] / total[rows] * scores[rows].log_softmax(1)).sum(1).mean() / 2)
    return torch.stack(losses).sum()


def train(
    loras: Tokens | Updates, lessons: Lessons, settings: Settings, plan: Plan = Plan(), *, checkpoint: Path | None = None, save_every: int = 200,
    on_step: Callable[[int, Mapping[str, float]], object] = lambda step, losses: None, stop: Callable[[], bool] = lambda: False,
) -> Encoder:
    """An encoder trained on these LoRAs, or as far as it came when `stop` said so; the same on every run, also when it was interrupted.

    loras: in the order of settings.layers. checkpoint: a file to go on from where it is there, and to write to every `save_every` steps and at a stop.
    on_step gets the number of steps taken and the losses of the last. Raises Refused for lessons that do not fit, a checkpoint of another training,
    and a loss that is not finite.
    """
    check(loras, lessons, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(plan, "weights"))
        encoder = Encoder(settings, plan.dropout)
        pictures = settings.dimension if lessons.directions is None else lessons.directions.shape[1]
        losses = Losses(plan, pictures, settings.dimension)
    both = nn.ModuleList([encoder, losses])
    matrices = [weight for weight in both.parameters() if weight.ndim > 1]
    optimiser = torch.optim.AdamW([{"params": matrices}, {"params": [weight for weight in both.parameters() if weight.ndim < 2], "weight_decay": 0.0}],
                                  plan.rate, betas=(0.9, 0.98), weight_decay=plan.decay)  # fmt: skip
    origin = _origin(loras, lessons, settings, plan) if checkpoint else ""
    step = _load(checkpoint, origin, both, optimiser) if checkpoint and checkpoint.is_file() else 0
    encoder.train()
    while step < plan.steps and not stop():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(plan, step))
            parts = _losses(encoder, losses, loras, lessons, plan)
            total = torch.stack(list(parts.values())).sum()
            total.backward()
        if not torch.isfinite(total):
            raise Refused(f"the loss is not finite at step {step + 1}: try a lower rate than {plan.rate}")
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate * min(1.0, (step + 1) / plan.warm) * (0.51 + 0.49 * math.cos(math.pi * step / plan.steps))
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if checkpoint and (step % save_every == 0 or step == plan.steps):
            _save(checkpoint, origin, step, both, optimiser)
        on_step(step, {name: part.item() for name, part in parts.items()})
    if checkpoint and step < plan.steps:
        _save(checkpoint, origin, step, both, optimiser)
    return encoder.eval().requires_grad_(False)


def check(loras: Tokens | Updates, lessons: Lessons, settings: Settings) -> None:
    """Raises Refused for lessons that do not fit the LoRAs or the settings."""
    n, groups = len(loras), lessons.groups
    trouble = ""
    if n < 2 or len(groups) != n:
        trouble = f"{n} LoRAs with {len(groups)} groups: training needs at least 2 LoRAs, and a group for each"
    elif loras.present.shape[1] != len(settings.layers) or not loras.present.any(1).all():
        trouble = "a LoRA without any layer of the encoder: leave it out"
    elif lessons.captions.shape != (len(lessons.of), settings.text):
        trouble = f"captions of shape {tuple(lessons.captions.shape)}; expected {(len(lessons.of), settings.text)}"
    elif lessons.directions is not None and (len(lessons.directions) != n or lessons.directions.shape[1] > settings.dimension):
        trouble = f"directions of shape {tuple(lessons.directions.shape)}; expected {n} of at most {settings.dimension} numbers"
    elif settings.text > settings.dimension:
        trouble = f"text vectors of {settings.text} numbers do not fit a space of {settings.dimension}"
    elif not set(groups.tolist()) & set(lessons.of.tolist()) and not (lessons.directions is not None and lessons.directions.any()):
        trouble = "neither captions nor directions for any LoRA: there is nothing to learn"
    elif not all(torch.isfinite(part).all() for part in (lessons.captions, lessons.directions) if part is not None):
        trouble = "captions or directions with NaN or infinity"
    if trouble:
        raise Refused(trouble)


def _losses(encoder: Encoder, losses: Losses, loras: Tokens | Updates, lessons: Lessons, plan: Plan) -> dict[str, Float[Tensor, ""]]:
    """Those of one batch, drawn from torch's own generator."""
    generator, n = torch.default_generator, len(loras)
    first = torch.randperm(n)[: plan.batch]
    second = torch.randint(n, (len(first),))
    share = torch.where(torch.rand(len(first)) < plan.mix, 0.3 + 0.4 * torch.rand(len(first)), 1.0)
    batch: Any = loras[first]
    batch = batch.mixed(loras[second], share).reweighted(encoder.blocks, plan.spread, generator).thinned(plan.drop, generator)
    vectors, weights = encoder(batch), torch.stack([share, 1 - share])
    groups = lessons.groups[torch.stack([first, second])]

    parts = {}
    if len(lessons.of):
        chosen = _of_each_group(lessons.of)
        own = groups[..., None] == lessons.of[chosen]
        logits = losses.scale(0) * vectors @ encoder.read(lessons.captions[chosen]).T
        parts["captions"] = plan.captions * contrast(logits, (weights[..., None] * own).sum(0))
    if lessons.directions is not None and (measured := lessons.directions.any(1)).any():
        columns = measured.nonzero()[:, 0]
        own = (groups[..., None] == lessons.groups[columns]).float()
        own = own / own.sum(-1, keepdim=True).clamp_min(1.0)
        directions = losses.directions(lessons.directions[columns].to(vectors.dtype))
        targets = (weights[..., None] * own).sum(0)
        parts["directions"] = plan.directions * contrast(losses.scale(1) * vectors @ directions.T, targets)
        goals = torch.zeros(n, directions.shape[1], dtype=vectors.dtype).index_copy(0, columns, directions)
        goal = (weights[..., None] * goals[torch.stack([first, second])]).sum(0)
        known = (measured[torch.stack([first, second])] | (weights == 0)).all(0)
        if known.any():
            parts["pull"] = plan.pull * (1 - F.cosine_similarity(vectors[known], goal[known])).mean()
    return parts


def _of_each_group(of: Int[Tensor, " c"]) -> Int[Tensor, " g"]:
    """A caption of each group, drawn anew."""
    order = (of + torch.rand(len(of), dtype=torch.float64)).argsort()
    return order[torch.cat([torch.ones(1, dtype=torch.bool), of[order].diff() != 0])]


def _seed(plan: Plan, what: object) -> int:
    return random.Random(f"{plan.seed}/{what}").getrandbits(63)


def _origin(loras: Tokens | Updates, lessons: Lessons, settings: Settings, plan: Plan) -> str:
    """A hash of all that a training depends on."""
    digest = hashlib.sha256(repr((plan, settings)).encode())
    tokens = loras if isinstance(loras, Tokens) else loras.figures
    factors = [] if isinstance(loras, Tokens) else [*loras.downs.values(), *loras.ups.values()]
    for part in (*vars(tokens).values(), *factors, *vars(lessons).values()):
        digest.update(b"" if part is None else repr(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(file: Path, origin: str, step: int, both: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write a checkpoint whole or not at all."""
    state = {"origin": origin, "step": step, "weights": both.state_dict(), "optimiser": optimiser.state_dict()}

    def write(part: BinaryIO) -> None:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # torch's own for a disk that is full
            raise OSError(errno.ENOSPC, f"it could not be written whole ({str(error).splitlines()[0][:100]})") from error

    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, write)


def _load(file: Path, origin: str, both: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Go on from a checkpoint: the step it was written at. Raises Refused for a damaged one, and for one of another training."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["origin"] == origin:
            both.load_state_dict(state["weights"])
            optimiser.load_state_dict(state["optimiser"])
            return int(state["step"])
    except Exception:  # the unpickler has no error of its own
        raise Refused(f"{file} is not a training checkpoint, or is damaged: delete it to begin again") from None
    raise Refused(f"{file} was made by another plan or from other LoRAs, captions or directions: give the same as then to go on, or delete it")
