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

from composition import prompt_syntax
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared.text_vector import text_vector
from composition.run import Run

LEAST, UNKNOWN, ALL, SHORT = 0.05, 0.1, 2.0, 5  # need: at least; without trigger words; when under SHORT letters remain


@dataclass(frozen=True)
class Options:
    tau: int = field(default=5, metadata={"ge": 1, "le": 1000, "help": "Steps of the LoRA that the prompt needs most."})
    last: int = field(default=5, metadata={"ge": 0, "le": 1000, "help": "Last steps that the character's LoRA has to itself."})


@method(title="W-Switch", about="One LoRA at a time, in turn, as long as the prompt needs it; the character last.", paper="2606.03792",
        symmetric=False)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    need = needs(run)
    total = sum(need.values())
    run.notes["needs"] = {name: round(value / total, 4) for name, value in need.items()}
    active = run.notes["leaders"] = []

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        name = turn(step, tuple(live)) if live else ""
        if step.stage == 0:
            active.append(name)
        return Prediction(run.guide(run.denoise(step, {name: live[name]} if name else {})), step.latents)

    def turn(step: Step, names: tuple[str, ...]) -> str:
        characters = [name for name in names if run.categories.get(name) == "character"]
        if characters and step.index >= step.count - options.last:
            return characters[0]
        shares = [need[name] / sum(need[name] for name in names) for name in names]
        blocks = lengths(shares, options.tau)
        turns = [name for name, length in zip(names, blocks, strict=True) for _ in range(length)]
        return turns[step.index % len(turns)]

    yield predict


def needs(run: Run) -> dict[str, float]:
    """How much the prompt needs each LoRA; only their ratio means anything."""
    prompt = prompt_syntax.words(run.request)
    whole, need = text_vector(run, prompt), {}
    for name in run.names:
        words = run.triggers.get(name, ())
        rest = without(prompt, words)
        if not words:
            need[name] = UNKNOWN
        elif len(rest) < SHORT:
            need[name] = ALL
        else:
            need[name] = max(LEAST, 1 - float(F.cosine_similarity(whole, text_vector(run, rest), dim=0)))
    return need


def lengths(need: Sequence[float], tau: int) -> list[int]:
    """Steps of each LoRA's block: `tau` for the one needed most, at least 1."""
    return [max(1, round(tau * value / max(need))) for value in need]


def without(prompt: str, words: Sequence[str]) -> str:
    """The prompt less these words, whole and in any case."""
    for word in words:
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split()).strip(" ,")
