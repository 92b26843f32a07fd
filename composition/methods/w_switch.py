"""W-Switch: Switch whose blocks are as long as the prompt needs each LoRA (arXiv 2606.03792).

How much the prompt needs a LoRA: 1 - cosine of the prompt's text vector with that of the prompt without its trigger words, the
vector being the mean over all positions of the text encoder's output (padding included, as in the authors' code: the values are
small, and dividing by the largest does the work). The last steps belong to the character.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.run import Run

LEAST, UNKNOWN, ALL, SHORT = 0.05, 0.1, 2.0, 5  # need: at least; without trigger words; when under SHORT letters remain


@dataclass(frozen=True)
class Options:
    tau: int = field(default=5, metadata={"ge": 1, "le": 1000, "help": "Steps of the LoRA that is needed most."})
    last: int = field(default=5, metadata={"ge": 0, "le": 1000, "help": "Last steps that belong to the character."})


@method(title="W-Switch", about="One LoRA at a time, in turn, as long as the prompt needs it; the character last.", paper="2606.03792",
        symmetric=False)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    need = needs(run)
    blocks = lengths(need, options.tau)
    turns = [name for name, length in zip(run.names, blocks, strict=True) for _ in range(length)]
    characters = [name for name in run.names if run.categories.get(name) == "character"]
    led: list[str] = []
    run.notes["needs"] = {name: round(value, 4) for name, value in zip(run.names, need, strict=True)}
    run.notes["leaders"] = led

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        name = turns[step.index % len(turns)] if turns else ""
        if characters and step.index >= step.count - options.last:
            name = characters[0]
        use = {name: live[name]} if name in live else {}
        led.append(name if use else "")
        return Prediction(run.guide(run.denoise(step, use)), step.latents)

    yield predict


def needs(run: Run) -> list[float]:
    """How much the prompt needs each LoRA, in order, summing to 1."""
    prompt, found = run.request.prompt, []
    whole = vector(run, prompt)
    for name in run.names:
        words = run.triggers.get(name, ())
        rest = without(prompt, words)
        if not words:
            found.append(UNKNOWN)
        elif len(rest) < SHORT:
            found.append(ALL)
        else:
            found.append(max(LEAST, 1 - float(F.cosine_similarity(whole, vector(run, rest), dim=0))))
    return [value / sum(found) for value in found]


def lengths(need: Sequence[float], tau: int) -> list[int]:
    """Steps of each LoRA's block: `tau` for the one needed most, at least 1."""
    return [max(1, round(tau * value / max(need))) for value in need]


def without(prompt: str, words: Sequence[str]) -> str:
    """The prompt less these words, whole and in any case."""
    for word in words:
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split()).strip(" ,")


def vector(run: Run, text: str) -> Float[Tensor, " D"]:
    """The mean over all positions of the text encoder's output, without any LoRA."""
    return run.encode(text, use={}).values["text"][-1, 0].float().mean(0)
