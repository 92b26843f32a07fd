"""SSR-Merge: all LoRAs added up, after a matrix in rank space has parted what they have in common (arXiv 2606.10617, ICML 2026).

y = W x + B diag(w) R A x, R measured once for a set of LoRAs (`composition.methods.shared.ssr`); with R = I it is Merge. Weights stay
sliders; constant ones are folded, so that a step costs what the bare base's does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from composition.loop import Predict
from composition.methods import method
from composition.methods.shared import ssr
from composition.methods.shared.static import added_up
from composition.run import Run


@dataclass(frozen=True)
class Options:
    prompts: ssr.Prompts = field(default="trigger", metadata={"help":
        "What each LoRA is asked for by when the set is measured: its trigger word, the prompt without the other LoRAs' words (own), "
        "or the whole prompt (request)."})
    ridge: float = field(default=ssr.RIDGE, metadata={"ge": 1e-8, "le": 10.0, "help":
        "Share of the mean energy of a rank that is added to all: larger keeps nearer to nothing, smaller fits closer."})
    on: ssr.Where = field(default="all", metadata={"help":
        "The layers that are mixed: all; those that read the prompt alone (text); or the others (picture). Elsewhere LoRAs are added up."})


@method(title="SSR-Merge", about="Adds all LoRAs up after a matrix per layer, measured once for a set, has taken out what they do twice.", paper="2606.10617",
        cost="1 (and K more, once for a set of LoRAs)", static=True, ranks="some")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    with added_up(run, ssr.Rewrites(run, options.prompts, options.ridge, options.on)) as predict:
        yield predict
