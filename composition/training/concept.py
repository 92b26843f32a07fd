"""Concept LoRAs: learn one or many new concepts on any backbone, from pictures with prompts (arXiv 2106.09685).

Many concepts train in one batch of rows, each row with its own adapter; the loss is a sum over adapters and gradients
are clipped adapter by adapter, so a concept trained in company is the one trained alone. Every random number of a step
follows from (plan, concept, step): a run that was stopped and resumed is the run that was not. A step is as many
operations for sixteen concepts as for two, and on a device with a queue of its own nothing in it waits for an answer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from composition.adapters import Adapters
from composition.adapters.trainable import Trainable
from composition.backbones import vae
from composition.backbones.base import Backbone
from composition.hooks.kernels import attention_for
from composition.loras.writer import write
from composition.refusal import Refused
from composition.training.batches import BaseRows, Batch, Batches
from composition.training.compiled import Compiled
from composition.training.losses import Losses
from composition.training.plan import TARGETS, Concept, Plan
from composition.training.precision import HalfBase
from composition.training.state import State, advanced
from composition.training.still import recomputing, still

__all__ = ["TARGETS", "Concept", "Plan", "choose", "latents_of", "train"]


def latents_of(backbone: Backbone, pixels: Float[Tensor, "n 3 height width"], part: int = 64) -> Float[Tensor, "n C H W"]:
    """Pictures in -1..1 as the denoiser sees them: encoded and scaled, in single precision at least."""
    return vae.encode(backbone.pipeline, pixels, part)


def train(
    backbone: Backbone, adapters: Adapters, concepts: Sequence[Concept], plan: Plan, folder: Path, *,
    checkpoint: Path | None = None, save_every: int = 100, on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    stop: Callable[[], bool] | None = None, checkpointing: bool = False, compiled: bool = False,
    describe: Callable[[str], Mapping[str, str]] | None = None,
) -> dict[str, Path]:
    """Train one adapter per concept and write `folder/<name>.safetensors`; returns the files by name.

    checkpoint: saved every `save_every` steps and at a stop, and continued from when it exists. on_step: (step, loss of
    each concept), after every step; reading a loss waits for the device, so read it now and then. stop: called after each
    step; when it returns True training ends there, and only the checkpoint is written. checkpointing: compute activations a
    second time rather than keep them (gradient checkpointing; less memory). compiled: compile the denoiser for the
    rows of a step (minutes at first, fewer and larger operations afterwards). describe: more of the header of a
    concept's file, called when its adapter is trained and still in place. Raises RuntimeError when a loss is not
    finite, within a few steps and before anything is written. Whatever else ends it (a full disk, a device's error, Ctrl-C),
    the checkpoint is of the last whole step where it could be written, and of an earlier one where not.
    """
    names = [concept.name for concept in concepts]
    if len(set(names)) != len(names):
        raise Refused(f"concepts must have different names, not {', '.join(names)}")
    layers = choose(backbone.components, plan.targets)
    again = recomputing(backbone.denoiser, adapters.checkpoint if checkpointing else None)
    with still(backbone.components.values()), again, adapters.training(names, plan.rank, layers, backbone.device) as trained:
        state = State(trained, concepts, plan)
        if checkpoint and checkpoint.is_file():
            state.load(checkpoint)
        batches = Batches(backbone, adapters, concepts, plan)
        step = Learning(backbone, adapters, plan, compiled)
        with state.rescued(checkpoint), step.lent.restored(), closing(batches.stream(state.step)) as stream:
            if not advanced(state, stream, step, on_step=lambda losses: on_step and on_step(state.step, Losses(names, losses)),
                            checkpoint=checkpoint, save_every=save_every, stop=stop):
                return {}
            metadata = [{**concept.metadata, **(describe(concept.name) if describe else {})} for concept in concepts]
            return _written(folder, trained, plan, names, metadata)


def _written(
    folder: Path, trained: Trainable, plan: Plan, names: Sequence[str], metadata: Sequence[Mapping[str, str]]
) -> dict[str, Path]:
    """The file of every adapter; all of them or, where one cannot be written, none, so that the same command may go on."""
    files: dict[str, Path] = {}
    try:
        for k, (name, header) in enumerate(zip(names, metadata, strict=True)):
            write(folder / f"{name}.safetensors", trained.factors(k), plan.rank, plan.alpha, header)
            files[name] = folder / f"{name}.safetensors"
    except BaseException:
        for file in files.values():
            file.unlink(missing_ok=True)
        raise
    return files


def choose(components: Mapping[str, nn.Module], targets: Sequence[str]) -> dict[str, list[str]]:
    """The layers to train, by component: the denoiser's that the targets name, the text encoders' with "text"."""
    chosen: dict[str, list[str]] = {}
    for component, model in components.items():
        text = component.startswith("text_encoder")
        ends = [end for target in targets if (target == "text") == text for end in TARGETS[target]]
        paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
                 and any(f".{path}".endswith(f".{end}") for end in ends)]  # fmt: skip
        if paths:
            chosen[component] = paths
    return chosen


class Learning:
    """Computes the gradients of a step."""

    def __init__(self, backbone: Backbone, adapters: Adapters, plan: Plan, compiled: bool = False) -> None:
        self.backbone, self.adapters, self.plan = backbone, adapters, plan
        self.lent = HalfBase(backbone.denoiser, backbone.device, plan.half)
        self.compiled = Compiled(backbone.denoiser, compiled)

    def __call__(self, batch: Batch) -> Float[Tensor, "K"]:
        """Adds to the gradients; returns the loss of each adapter."""
        device, goal = self.backbone.device, batch.goal
        positions = batch.noisy.shape[-2] * batch.noisy.shape[-1]
        # The backward pass, too: it may compute activations again.
        with attention_for(device, positions=positions, gradients=True), self.lent():
            with torch.autocast(device.type, torch.bfloat16, enabled=self.plan.half):
                if batch.base_rows is not None:
                    goal = goal + _base(self.backbone, self.adapters, batch, batch.base_rows)
                with self.adapters.in_turn(self.plan.batch), self.compiled():
                    guess = self.backbone.denoise(batch.noisy, batch.t, batch.cond)[0]
            each = F.mse_loss(guess.to(goal), goal, reduction="none").unflatten(0, (batch.count, -1))
            losses = each.flatten(1).mean(1)
            losses.sum().backward()
        return losses.detach()


@torch.no_grad()
def _base(backbone: Backbone, adapters: Adapters, batch: Batch, base_rows: BaseRows) -> Float[Tensor, "rows C H W"]:
    """The base's predictions without adapters for `base_rows`; 0 elsewhere."""
    adapters.use({})
    prediction = backbone.denoise(batch.noisy[base_rows.rows], batch.t[base_rows.rows], base_rows.cond)[0].to(batch.goal)
    return torch.zeros_like(batch.goal).index_add_(0, base_rows.rows, prediction)
