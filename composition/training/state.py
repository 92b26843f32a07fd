"""The factors in training, their optimiser and the step reached: all that a checkpoint holds."""

import errno
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from composition import atomic
from composition.adapters.trainable import Trainable
from composition.refusal import Refused
from composition.training.plan import Learned, Schedule

Batch = TypeVar("Batch")
LOOK = 16  # steps whose losses are looked at together: a look waits for the device


class State:
    """Adapter k owns row k of the leaf, of its gradient and of the optimiser's moments.

    A step is the same few operations whatever the number of adapters and layers.
    """

    def __init__(self, trained: Trainable, concepts: Sequence[Learned], plan: Schedule) -> None:
        self.trained, self.plan, self.step = trained, plan, 0
        self.names, self.origins = [concept.name for concept in concepts], [concept.origin for concept in concepts]
        for k, name in enumerate(self.names):
            generator = torch.Generator().manual_seed(random.Random(f"{plan.seed}/{name}").getrandbits(63))
            for layers in trained.factors(k).values():
                for down in (factors.stored_down for factors in layers.values()):
                    fresh = torch.rand(down.shape, generator=generator, dtype=torch.float64)
                    down.copy_((fresh * 2 - 1) / down[0].numel() ** 0.5)
        fused = trained.leaf.device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.AdamW([trained.leaf], lr=plan.rate, betas=(0.9, 0.99), weight_decay=plan.decay, fused=fused)
        self._losses: list[Tensor] = []
        self._saved = 0  # the step of the last checkpoint
        self._whole = True  # False in the middle of a step

    def advance(self, losses: Float[Tensor, "K"]) -> None:
        """Clip each adapter's gradient to length 1, take one step. Raises as `check` does, now and then."""
        self._losses.append(losses)
        grad = self.trained.leaf.grad
        assert grad is not None
        self._whole = False
        grad.mul_((1.0 / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0))
        warm = min(1.0, (self.step + 1) / self.plan.warm)
        rate = self.plan.rate * warm * (0.55 + 0.45 * math.cos(math.pi * self.step / self.plan.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.trained.changed()
        self.step += 1
        self._whole = True
        if len(self._losses) >= LOOK:
            self.check()

    def check(self) -> None:
        """Look at the losses since the last look. Raises RuntimeError when one is not finite; nothing of such a run is saved."""
        if not self._losses:
            return
        fine = torch.isfinite(torch.stack(self._losses)).all(dim=1).tolist()
        first = self.step - len(fine)
        if not all(fine):
            raise RuntimeError(f"the loss is not finite at step {first + fine.index(False)}: try a lower rate than {self.plan.rate}")
        self._losses = []

    def save(self, file: Path) -> None:
        """Write the checkpoint whole or not at all. Raises as `check` does."""
        self.check()
        file.parent.mkdir(parents=True, exist_ok=True)
        held = {"plan": repr(vars(self.plan)), "names": self.names, "origins": self.origins, "step": self.step,
                "leaf": self.trained.leaf.detach(), "optimiser": self.optimiser.state_dict()}  # fmt: skip
        atomic.write(file, lambda part: stored(held, part))
        self._saved = self.step

    @contextmanager
    def rescued(self, file: Path | None) -> Iterator[None]:
        """Whatever ends the training while this lasts, what was learned since the last checkpoint is saved, where that can be."""
        try:
            yield
        except BaseException:
            if file is not None and self._whole and self.step > self._saved:
                with suppress(OSError, RuntimeError):  # the first error is the one to tell of
                    self.save(file)
            raise

    def load(self, file: Path) -> None:
        """Go on from a checkpoint. Raises Refused when it is damaged, or of another plan, concepts, pictures or version."""
        held = _read(file)
        other = next((words for name, words, mine in (
            ("plan", "by another plan", repr(vars(self.plan))), ("names", "for other concepts", self.names),
            ("origins", "from other pictures, captions or another model", self.origins)) if held[name] != mine), "")
        if other:
            raise Refused(f"{file} was made {other}: give the same flags as then to go on, or delete it to begin again")
        with torch.no_grad():
            self.trained.leaf.copy_(held["leaf"])
        self.trained.changed()
        self.optimiser.load_state_dict(held["optimiser"])
        self.step = self._saved = held["step"]


def advanced(
    state: State, batches: Iterable[Batch], step: Callable[[Batch], Float[Tensor, "K"]], *, checkpoint: Path | None, save_every: int,
    on_step: Callable[[Float[Tensor, "K"]], object], stop: Callable[[], bool] | None,
) -> bool:
    """Take the steps that are left, each on its batch; False when `stop` ended it before.

    step: adds to the gradients and returns the losses, which `on_step` gets after the step. The checkpoint is saved every `save_every`
    steps and at a stop. Raises RuntimeError for a loss that is not finite.
    """
    for batch in batches:
        losses = step(batch)
        state.advance(losses)
        on_step(losses)
        stopped = stop is not None and state.step < state.plan.steps and stop()
        if checkpoint and (stopped or state.step % save_every == 0):
            state.save(checkpoint)
        if stopped:
            return False
    state.check()
    return True


def stored(held: Mapping[str, Any], part: BinaryIO) -> None:
    """torch.save, whose own error for a disk that is full is a RuntimeError."""
    try:
        torch.save(held, part)
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, f"it could not be written whole ({str(error).splitlines()[0][:100]})") from error


def reached(file: Path) -> int:
    """The step a checkpoint was written at. Raises Refused when it is damaged."""
    return int(_read(file)["step"])


def _read(file: Path) -> dict[str, Any]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler has no error of its own: damaged bytes end in IndexError, EOFError, KeyError, ...
        held = None
    if isinstance(held, dict) and "parts" in held:  # factors layer by layer, as before they were one leaf
        raise Refused(f"{file} was written by an earlier version of Medley: go on with that one, or delete it to begin again")
    if not isinstance(held, dict) or not {"plan", "names", "origins", "leaf", "optimiser", "step"} <= set(held):
        raise Refused(f"{file} is not a training checkpoint, or is damaged: delete it to begin again")
    return held
