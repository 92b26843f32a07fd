"""Condition LoRAs: a new kind of picture that controls others, learned from pairs (EasyControl, arXiv 2503.07027).

Two streams share a frozen base. The condition's tokens pass it alone, at t = 0, with the LoRA on their q, k, v and on the output of their
projection; their keys and values go into a bank. The picture's noisy tokens pass it as ever, and read the bank. The two passes are those of
inference (`composition.hooks.banks`), with the gradient on: it runs from the loss through the keys and values into the LoRA, and nothing
else learns. The condition has one small size, pictures have many, and its position ids are stretched over each (or, of a subject, lie below it).
Every random number follows from (plan, name, step): a run that was stopped and resumed is the run that was not.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from composition import conditions
from composition.adapters.trainable import Shape, Trainable
from composition.backbones.flux import packed
from composition.hooks.banks import Appended, Banks, Update, easycontrol
from composition.hooks.kernels import attention_for
from composition.loop import Conditioning
from composition.loras import condition as files
from composition.loras.kinds.lora import Factors
from composition.refusal import Refused
from composition.training import noise
from composition.training.batches import BaseRows
from composition.training.draws import Fresh
from composition.training.encodings import Encodings
from composition.training.losses import Losses
from composition.training.pairs import ConditionPlan, Pairs, pair_draws
from composition.training.precision import HalfBase
from composition.training.state import State, advanced
from composition.training.still import recomputing, still

DOUBLE, SINGLE = ("to_q", "to_k", "to_v", "to_out.0"), ("to_q", "to_k", "to_v")  # projections that get a LoRA
Updates = Mapping[str, Update]


class PairRows(NamedTuple):
    """One step's rows: the views of each pair, pair after pair. goal: what the denoiser should predict, 0 in `base_rows`, whose condition is
    blank and whose goal is the base's own answer."""

    noisy: Float[Tensor, "rows C H W"]
    t: Num[Tensor, "rows"]
    goal: Float[Tensor, "rows C H W"]
    conditions: Float[Tensor, "pairs C h w"]
    ids: Float[Tensor, "N 3"]
    cond: Conditioning  # (1, rows, ...)
    alone: Conditioning  # (1, pairs, ...), for the conditions
    base_rows: BaseRows | None


def layers(backbone: Any) -> dict[str, Shape]:
    """The linear layers that get a LoRA, by path, and its input and output: of the projection both are its output."""
    shapes = {}
    for attention in backbone.prompt_attention():
        for name in SINGLE if attention.startswith("single_") else DOUBLE:
            path = f"{attention}.{name}"
            reads, out = Shape.of(backbone.denoiser.get_submodule(path))
            shapes[path] = Shape((out,), out) if files.of_output(path) else Shape(reads, out)
    return shapes


def train(
    backbone: Any, pairs: Pairs, plan: ConditionPlan, folder: Path, *,
    checkpoint: Path | None = None, save_every: int = 100, on_step: Callable[[int, Mapping[str, float], Updates], None] | None = None,
    stop: Callable[[], bool] | None = None, checkpointing: bool = False, describe: Callable[[Updates], Mapping[str, str]] | None = None,
    begin: Mapping[str, Factors] | None = None,
) -> Path | None:
    """Train a condition LoRA and write `folder/<name>.safetensors`; None when `stop` ended it before.

    checkpoint, save_every, stop, checkpointing: as for concepts (`composition.training.concept`). on_step: (step, loss by name, the LoRA as it
    stands), after every step. describe: more of the file's header, called with the trained LoRA. begin: another one's factors by path of layer, of this
    rank, which a new training begins with (say so in `pairs.origin`). Raises Refused for a model of another family than FLUX, RuntimeError when
    a loss is not finite.
    """
    if backbone.family != "flux":
        raise Refused(f"condition LoRAs can be trained on FLUX (and on pocket-flux), not on a model of the family {backbone.family}")
    (component,) = (name for name, module in backbone.components.items() if module is backbone.denoiser)
    banks = Banks(backbone.denoiser, tuple(backbone.prompt_attention()))
    trained = Trainable([pairs.name], plan.rank, {component: layers(backbone)}, backbone.device)
    with still(backbone.components.values()), recomputing(backbone.denoiser, banks.checkpoint if checkpointing else None):
        state = State(trained, [pairs], plan)
        if checkpoint and checkpoint.is_file():
            state.load(checkpoint)
        elif begin is not None:
            _copy(begin, next(iter(trained.factors(0).values())))
            trained.changed()
        learning = Learning(backbone, banks, trained, plan, pairs.settings.factor)
        rows = Rows(backbone, pairs, plan)

        def report(losses: Float[Tensor, "1"]) -> None:
            if on_step:
                on_step(state.step, Losses([pairs.name], losses), learning.updates())

        with state.rescued(checkpoint), learning.lent.restored():
            if not advanced(state, rows.stream(state.step), learning, on_step=report, checkpoint=checkpoint, save_every=save_every, stop=stop):
                return None
            words = {**pairs.words, **(describe(learning.updates()) if describe else {})}
            files.write(folder / f"{pairs.name}.safetensors", learning.factors(), pairs.settings, words)
            return folder / f"{pairs.name}.safetensors"


def _copy(begin: Mapping[str, Factors], factors: Mapping[str, Factors]) -> None:
    """Write one LoRA's numbers into the factors of another. Raises Refused when they are of other layers, or of another rank."""
    if {path: (layer.stored_down.shape, layer.stored_up.shape) for path, layer in begin.items()} != {
            path: (layer.stored_down.shape, layer.stored_up.shape) for path, layer in factors.items()}:  # fmt: skip
        raise Refused("a condition LoRA can only begin with one of the same layers and rank")
    for path, layer in factors.items():
        layer.stored_down.copy_(begin[path].stored_down)
        layer.stored_up.copy_(begin[path].stored_up)


class Rows:
    """Draws the rows of a step; prompts are encoded before the first."""

    def __init__(self, backbone: Any, pairs: Pairs, plan: ConditionPlan) -> None:
        self.backbone, self.pairs, self.plan = backbone, pairs, plan
        self.noise = noise.of(backbone.scheduler)
        self.dtype = None if plan.half else backbone.dtype  # autocast takes single precision as it is
        self.fresh, self.drawn = Fresh([pairs], plan, plan.batch * plan.views), pair_draws(pairs, plan, self.noise)
        used = self.drawn.prompts.unique()
        self.encodings = Encodings(backbone, [self.drawn.words[number] for number in used.tolist()])
        self.place = torch.zeros(len(self.drawn.words), dtype=torch.long)  # of a word among the encodings
        self.place[used] = torch.arange(len(used))

    def stream(self, first: int) -> Iterator[PairRows]:
        """The rows of step `first` and of those after it."""
        return map(self.draw, range(first, self.plan.steps))

    def draw(self, step: int) -> PairRows:
        drawn, device, views = self.drawn, self.backbone.device, self.plan.views
        bucket, pick, blank = self.pairs.buckets[int(drawn.bucket[step])], drawn.pairs[step], drawn.blank[step]
        latents, seen = bucket.latents[pick].cpu().repeat_interleave(views, 0), bucket.conditions[pick].cpu()
        t, prompts, base = drawn.times[step].flatten(), self.place[drawn.prompts[step]], blank.repeat_interleave(views)
        fresh = self.fresh.draw(step, latents.shape[1:], latents.dtype).to(latents.dtype)
        noisy, goal = self.noise.mix(latents, fresh, t)
        seen = torch.where(blank.view(-1, 1, 1, 1), self.pairs.blank.cpu(), seen)
        ids = conditions.ids(self.pairs.settings, _grid(latents), _grid(seen))
        noisy, seen = (value.to(device, self.dtype or value.dtype, non_blocking=True) for value in (noisy, seen))
        goal = goal.masked_fill(base.view(-1, 1, 1, 1), 0.0)
        shown, rows = prompts.repeat_interleave(views), base.nonzero()[:, 0]
        return PairRows(noisy, t.to(device), goal.to(device), seen, ids.to(device), self.encodings.rows(shown), self.encodings.rows(prompts),
                        BaseRows(rows.to(device), self.encodings.rows(shown[rows])) if len(rows) else None)  # fmt: skip


def _grid(latents: Float[Tensor, "n C H W"]) -> tuple[int, int]:
    """Rows and columns of tokens."""
    return latents.shape[-2] // 2, latents.shape[-1] // 2


class Learning:
    """Computes the gradients of a step."""

    def __init__(self, backbone: Any, banks: Banks, trained: Trainable, plan: ConditionPlan, strength: float = 1.0) -> None:
        """strength: at which the banks are read."""
        self.backbone, self.banks, self.trained, self.plan, self.strength = backbone, banks, trained, plan, strength
        self.paths = list(next(iter(trained.layers.values())))
        self.lent = HalfBase(backbone.denoiser, backbone.device, plan.half)

    def factors(self) -> dict[str, Factors]:
        """The LoRA as it stands, by path of layer: views of what is trained, in single precision."""
        by_path = next(iter(self.trained.factors(0).values()))
        return {path: Factors(layer.stored_down, layer.stored_up, self.plan.alpha) for path, layer in by_path.items()}

    def updates(self) -> Updates:
        """The same as a bank is extracted with, without a gradient."""
        return easycontrol(self.factors())

    def learning_updates(self, like: Tensor) -> Updates:
        """The same with the gradient on, in the dtype of `like`."""
        scale = 1.0 if self.plan.alpha is None else self.plan.alpha / self.plan.rank
        updates = {}
        for slot, path in enumerate(self.paths):
            down, up = self.trained.read(slot, like)
            updates[path] = Update(down[0], up[0], scale, files.of_output(path))
        return updates

    def __call__(self, rows: PairRows) -> Float[Tensor, "1"]:
        """Adds to the gradients; returns the loss."""
        device, goal = self.backbone.device, rows.goal
        positions = rows.noisy.shape[-2] * rows.noisy.shape[-1] // 4 + len(rows.ids)
        with attention_for(device, positions=positions, gradients=True), self.lent():  # the backward pass too: it may compute activations again
            with torch.autocast(device.type, torch.bfloat16, enabled=self.plan.half):
                if rows.base_rows is not None:
                    goal = goal + _base(self.backbone, rows, rows.base_rows)
                like = rows.noisy.bfloat16() if self.plan.half else rows.noisy
                with self.banks.extracting(self.learning_updates(like)) as bank:
                    self.backbone.read_alone(packed(rows.conditions), rows.ids, rows.t.new_zeros(()), rows.alone)
                read = tuple(pair for pair in range(len(rows.conditions)) for _ in range(self.plan.views))
                with self.banks.appended([Appended(bank, self.strength, read)]):
                    guess = self.backbone.denoise(rows.noisy, rows.t, rows.cond)[0]
            loss = F.mse_loss(guess.to(goal), goal)
            loss.backward()
        return loss.detach()[None]


@torch.no_grad()
def _base(backbone: Any, rows: PairRows, base_rows: BaseRows) -> Float[Tensor, "rows C H W"]:
    """The base's predictions without a condition for `base_rows`; 0 elsewhere."""
    prediction = backbone.denoise(rows.noisy[base_rows.rows], rows.t[base_rows.rows], base_rows.cond)[0].to(rows.goal)
    return torch.zeros_like(rows.goal).index_add_(0, base_rows.rows, prediction)
