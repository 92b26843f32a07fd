"""Merge: all LoRAs added up, W + sum w B A, in every step. The way today's tools do it (arXiv 2402.16843, section 2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.run import Run


@dataclass(frozen=True)
class Options:
    """Merge has none: each LoRA's weight, blocks and start/end say it all."""


@method(title="Merge", about="Adds all LoRAs up, each at its weight.", paper="2402.16843", steady=True, static=True)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    def predict(step: Step) -> Prediction:
        return Prediction(run.guide(run.denoise(step)), step.latents)

    yield predict
