"""The loop that makes every picture: ask for a prediction, let the scheduler step, repeat.

Shapes: B pictures, R guidance rows (negative, positive; 1 without guidance), K adapters, *S the latent's own shape.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Generator, Tensor


class Step(NamedTuple):
    """One round of the loop: its index (from 0) of count, the scheduler's time, the latents it starts from."""

    index: int
    count: int
    t: Num[Tensor, ""]
    latents: Float[Tensor, "B *S"]


class Prediction(NamedTuple):
    """What a method answers: the guided denoiser output, and the latents it belongs to (a method may move them)."""

    value: Float[Tensor, "B *S"]
    latents: Float[Tensor, "B *S"]


Predict = Callable[[Step], Prediction]


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
    generator: Generator | Sequence[Generator] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Float[Tensor, "B *S"]:
    """Denoise `latents` over `timesteps`; equal to the loop of the stock pipelines for the same predictions.

    generator: one per picture, for schedulers that draw noise. on_step sees each step's result. Gradients are off but
    may be switched on inside predict (inference mode, which forbids that, is never used).
    """
    noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for index, t in enumerate(timesteps):
        with torch.no_grad():
            value, moved = predict(Step(index, len(timesteps), t, latents))
            latents = scheduler.step(value, t, moved, return_dict=False, **noise)[0]
        if on_step:
            on_step(Step(index, len(timesteps), t, latents))
    return latents
