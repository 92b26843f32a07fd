"""Switch: one LoRA at a time, the next one every tau steps (arXiv 2402.16843, section 3.1).

At step t = 1, 2, ... the live LoRA is number floor(((t - 1) mod (k tau)) / tau) + 1: the change comes before step t
when (t - 1) mod tau = 0. The authors' code changes after it, so its first LoRA has tau + 1 steps, and encodes the prompt
with the first LoRA alone; `reference` does both. A LoRA that is off at a step has no turn in it: k counts those that are on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.run import Run


@dataclass(frozen=True)
class Options:
    tau: int = field(default=5, metadata={"ge": 1, "le": 1000, "help": "Steps before switching to the next LoRA."})
    reference: bool = field(default=False, metadata={
        "help": "Switch one step late and encode the prompt with the first LoRA only, as the authors' code does."})


@method(title="Switch", about="One LoRA at a time, in turn, a few steps each.", paper="2402.16843", symmetric=False)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    active = run.notes["leaders"] = []

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        names = tuple(live)
        name = leader(step.index, names, options.tau, late=options.reference)
        first = run.encode(use={first: live[first] for first in names[:1]}) if options.reference else None
        if step.stage == 0:
            active.append(name)
        return Prediction(run.guide(run.denoise(step, {name: live[name]} if name else {}, first)), step.latents)

    yield predict


def leader(index: int, names: tuple[str, ...], tau: int, *, late: bool = False) -> str:
    """The LoRA that is on at step `index` (from 0); "" when there is none. late: the authors' off-by-one."""
    if not names:
        return ""
    turn = max(index - 1, 0) // tau if late else index // tau
    return names[turn % len(names)]
