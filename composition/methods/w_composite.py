"""W-Composite: Composite with each LoRA weighted by how near its trigger words are to the prompt (arXiv 2606.03792).

Weight: cosine of the prompt's text vector with that of the LoRA's trigger words, the weights made to sum to 1; the vector is the
mean over all positions of the text encoder's output. A LoRA without trigger words gets the mean of the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F

from composition import prompt_syntax
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared.text_vector import text_vector
from composition.run import Run


@dataclass(frozen=True)
class Options:
    """W-Composite has none."""


@method(title="W-Composite", about="Makes one prediction with each LoRA at every step and averages them by the prompt's need.",
        paper="2606.03792", cost="K")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    run.notes["weights"] = {name: round(value, 4) for name, value in nearness(run, run.names).items()}

    def predict(step: Step) -> Prediction:
        parts = run.denoise_passes(step, run.passes(step))
        live = run.live(step)
        if not live:
            return Prediction(run.guide(parts.mean(0)), step.latents)
        near = nearness(run, tuple(live))
        weight = parts.new_tensor([near[name] for name in live]).view(-1, *[1] * (parts.ndim - 1))
        return Prediction(run.guide((parts * weight).sum(0)), step.latents)

    yield predict


def nearness(run: Run, names: Sequence[str]) -> dict[str, float]:
    """The weights of these LoRAs, summing to 1; never under a hundredth of the largest."""
    whole, near = text_vector(run, prompt_syntax.words(run.request)), {}
    for name in names:
        if words := run.triggers.get(name, ()):
            near[name] = max(0.01, float(F.cosine_similarity(whole, text_vector(run, ", ".join(words)), dim=0)))
    usual = sum(near.values()) / len(near) if near else 1.0
    weights = {name: near.get(name, usual) for name in names}
    total = sum(weights.values()) or 1.0
    return {name: value / total for name, value in weights.items()}
