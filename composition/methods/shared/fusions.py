"""Static fusions by name, for methods that gate LoRAs by place: the factors they gate are then the rewritten ones."""

from collections.abc import Mapping
from typing import Literal

from composition.adapters.stack import Rewrite
from composition.loop import Step
from composition.methods.shared.projection import projected
from composition.methods.shared.ssr import RIDGE, Rewrites
from composition.methods.shared.static import Rewriting, Rewritten
from composition.run import Run

Fusion = Literal["none", "ssr", "ssr-text", "np-lora"]
MU = 0.5  # of NP-LoRA's projection, as the paper has it
HELP = "What is done to the LoRAs' factors beforehand: ssr (ssr-text: in the layers of the prompt alone) or np-lora."


def fused(run: Run, fusion: Fusion) -> Rewritten:
    """A context whose `at(step)` rewrites the factors as the fusion has it."""
    return Rewritten(run, _rewriting(run, fusion))


def _rewriting(run: Run, fusion: Fusion) -> Rewriting:
    if fusion in ("ssr", "ssr-text"):
        return Rewrites(run, "trigger", RIDGE, "text" if fusion == "ssr-text" else "all")
    if fusion == "np-lora":
        return lambda step, live: projected(run, live, MU)
    return _nothing


def _nothing(step: Step, live: tuple[str, ...]) -> Mapping[str, Rewrite]:
    return {}
