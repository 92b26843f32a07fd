"""W-Composite: Composite with each LoRA weighted by how near its trigger words are to the prompt (arXiv 2606.03792).

Weight: cosine of the prompt's text vector with that of the LoRA's trigger words, the weights made to sum to 1; the vector is the
mean over all positions of the text encoder's output. A LoRA without trigger words gets the mean of the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F

from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.w_switch import vector
from composition.run import Run


@dataclass(frozen=True)
class Options:
    """W-Composite has none."""


@method(title="W-Composite", about="Asks every LoRA at every step and averages the answers by the prompt's need.", paper="2606.03792",
        cost="K")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    near = nearness(run)
    run.notes["weights"] = {name: round(value, 4) for name, value in near.items()}

    def predict(step: Step) -> Prediction:
        parts = run.denoise_each(step)
        live = list(run.live(step))
        if not live:
            return Prediction(run.guide(parts.mean(0)), step.latents)
        total = sum(near[name] for name in live)
        weight = parts.new_tensor([near[name] / total for name in live]).view(-1, *[1] * (parts.ndim - 1))
        return Prediction(run.guide((parts * weight).sum(0)), step.latents)

    yield predict


def nearness(run: Run) -> dict[str, float]:
    """Each LoRA's weight, summing to 1; never under a hundredth of the largest."""
    whole, found = vector(run, run.request.prompt), {}
    for name in run.names:
        if words := run.triggers.get(name, ()):
            found[name] = max(0.01, float(F.cosine_similarity(whole, vector(run, ", ".join(words)), dim=0)))
    usual = sum(found.values()) / len(found) if found else 1.0
    weights = {name: found.get(name, usual) for name in run.names}
    total = sum(weights.values()) or 1.0
    return {name: value / total for name, value in weights.items()}
