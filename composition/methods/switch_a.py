"""Switch-A: Switch in CMLoRA's order: the high-frequency LoRAs in turn, then the low with the others (arXiv 2502.04923, 4.1).

The released code never leaves its first rotation for three LoRAs or more and never uses the low; this is what it means.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import dominance
from composition.run import Run


@dataclass(frozen=True)
class Options:
    tau: int = field(default=5, metadata={"ge": 1, "le": 1000, "help": "Steps before switching to the next LoRA."})
    boundary: float = field(default=0.6, metadata={"ge": 0.0, "le": 1.0, "help": "Share of the steps after which the low-frequency LoRAs have turns."})
    order: str = field(default="", metadata={
        "help": "LoRAs by falling frequency, separated by commas, the others after them by category (character first); or change or "
        "level: as measured; category: by category alone; empty: as measured where all were."})
    low: str = field(default="", metadata={"help": "LoRAs of low frequency, which have turns late; empty: places; none: no LoRA."})


@method(title="Switch-A", about="One LoRA at a time, in turn, by their frequency.", paper="2502.04923", symmetric=False)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    high, low = dominance.ordered(run.names, run.categories, options.order, options.low, known=run.request.names)
    active = run.notes["leaders"] = []

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        late = step.index >= options.boundary * step.count
        name = dominance.leader(*dominance.among(live, high, low), step.index // options.tau, late=late) if live else ""
        if step.stage == 0:
            active.append(name)
        return Prediction(run.guide(run.denoise(step, {name: live[name]} if name else {})), step.latents)

    yield predict
