"""Composite: one prediction per LoRA, averaged before guidance (arXiv 2402.16843, section 3.2, all w_j = 1)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.run import Run


@dataclass(frozen=True)
class Options:
    reference: bool = field(default=False, metadata={
        "help": "Encode the prompt once with all text-encoder LoRAs added up, as the authors' code does, "
                "instead of once per LoRA."})


@method(title="Composite", about="Makes one prediction with each LoRA at every step and averages them.", paper="2402.16843", cost="K")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    def predict(step: Step) -> Prediction:
        live = run.live(step)
        together = dict.fromkeys(live, run.encode(use=live)) if options.reference else None
        return Prediction(run.guide(run.denoise_passes(step, run.passes(step, together)).mean(0)), step.latents)

    yield predict
