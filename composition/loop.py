"""The loop that makes every picture: ask for a prediction, let the scheduler step, repeat.

Shapes: B pictures, R guidance rows (negative, positive; 1 without guidance), K adapters, *S the latent's own shape.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Num
from torch import Generator, Tensor


class Step(NamedTuple):
    """One evaluation of the loop: the step it belongs to (from 0) of count, the scheduler's time, the latents it starts from.

    stage: 0 at a step's first evaluation, 1 at its second, as the corrector of Heun's method: samplers of higher order have several
    evaluations a step. Which LoRAs are on, whose turn it is and what is counted as progress follow steps.
    """

    index: int
    count: int
    t: Num[Tensor, ""]
    latents: Float[Tensor, "B *S"]
    stage: int = 0


class Prediction(NamedTuple):
    """What a method answers: the guided denoiser output, and the latents it belongs to (a method may move them)."""

    value: Float[Tensor, "B *S"]
    latents: Float[Tensor, "B *S"]


Predict = Callable[[Step], Prediction]

LOOK = 8  # steps whose latents are looked at together on a device with a queue of its own: a look waits for it


class NotFinite(ArithmeticError):
    """Numbers of a picture overflowed. step: the first, from 1, after which the latents are not finite; None: while they were decoded."""

    def __init__(self, step: int | None = None, count: int = 0) -> None:
        super().__init__(f"the latents are not finite after step {step} of {count}" if step else "the decoded picture is not finite")
        self.step, self.count = step, count


class _Watch:
    """Looks whether the latents are finite, on a processor after every step, elsewhere every so many and after the last."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._finite: dict[int, Bool[Tensor, ""]] = {}  # by step, not yet looked at

    def see(self, index: int, latents: Float[Tensor, "B *S"]) -> None:
        """Raises NotFinite, naming the first step that was not."""
        self._finite[index] = torch.isfinite(latents).all()
        if latents.device.type != "cpu" and len(self._finite) < LOOK and index + 1 < self._count:
            return
        seen = torch.stack(list(self._finite.values())).tolist()
        if not all(seen):
            raise NotFinite(list(self._finite)[seen.index(False)] + 1, self._count)
        self._finite.clear()


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the denoiser reads besides the latents: named tensors, each (R, 1 or B, ...), negative row first."""

    values: Mapping[str, Float[Tensor, "R B *any"]]

    @property
    def rows(self) -> int:
        return next(iter(self.values.values())).shape[0]

    def positive(self) -> "Conditioning":
        """The positive row alone: R = 1."""
        return Conditioning({name: value[-1:] for name, value in self.values.items()})

    def negative(self) -> "Conditioning":
        """The negative row alone: R = 1."""
        return Conditioning({name: value[:1] for name, value in self.values.items()})

    @staticmethod
    def stacked(parts: Sequence["Conditioning"]) -> "Conditioning":
        """K conditionings as one with K * R rows, adapter-major."""
        return Conditioning({name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values})


def sample(
    predict: Predict,
    scheduler: Any,
    latents: Float[Tensor, "B *S"],
    timesteps: Num[Tensor, "T"],
    *,
    stages: Sequence[tuple[int, int]] | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    on_step: Callable[[Step], None] | None = None,
    keep: Callable[[Float[Tensor, "B *S"], Num[Tensor, ""] | None], Float[Tensor, "B *S"]] | None = None,
) -> Float[Tensor, "B *S"]:
    """Denoise `latents` over `timesteps`; equal to the loop of the stock pipelines for the same predictions.

    stages: (step, stage) of each of `timesteps` (`schedulers.stages`); None: each is a step. generator: one per picture, for
    schedulers that draw noise. on_step sees each step's result, after its last evaluation. Gradients are off but may be
    switched on inside predict (inference mode, which forbids that, is never used). keep: puts back what of the latents is to be kept, after
    every whole step: gets them and the scheduler's next time, None after the last. Raises NotFinite when the latents overflow.
    """
    stages = [(index, 0) for index in range(len(timesteps))] if stages is None else stages
    count = stages[-1][0] + 1 if stages else 0
    noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    watch = _Watch(count)
    times = [*timesteps, None]
    for place, ((index, stage), (following, _)) in enumerate(zip(stages, [*stages[1:], (count, 0)], strict=True)):
        t = timesteps[place]
        with torch.no_grad():
            value, moved = predict(Step(index, count, t, latents, stage))
            latents = scheduler.step(value, t, moved, return_dict=False, **noise)[0]
            if keep is not None and following != index:
                latents = keep(latents, times[place + 1])
        if following != index:
            watch.see(index, latents)
        if on_step and following != index:
            on_step(Step(index, count, t, latents, stage))
    return latents
