"""NP-LoRA: content LoRAs projected off the directions that a style LoRA reads, so that adding them up leaves the style alone (arXiv 2511.11051).

Per layer, V are the right singular vectors of the style's update, a basis of what its A reads, and each content LoRA's A becomes
A - mu / (1 + mu) A V V^T: mu = 0 is Merge, a large mu takes all of it. The paper has one LoRA of each role. Here every style LoRA is
protected, from all LoRAs of other categories, by the joint basis of all styles; a layer that no style touches stays as it is, and
without both roles it is Merge. Static and exact: constant weights are folded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from composition.loop import Predict
from composition.methods import method
from composition.methods.shared.projection import projected
from composition.methods.shared.static import added_up
from composition.run import Run


@dataclass(frozen=True)
class Options:
    mu: float = field(default=0.5, metadata={"ge": 0.0, "le": 1e6, "help":
        "How much of the shared input directions is taken from the others: the share mu / (1 + mu); 0 is Merge."})
    protect: Literal["style", "content"] = field(default="style", metadata={"help":
        "Whose input directions are protected: the style's, from content LoRAs, as the paper does; or content's, from styles."})
    energy: float = field(default=1.0, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the protected energy whose strongest directions are protected; 1 protects all, as the paper does."})


@method(title="NP-LoRA", about="Adds all LoRAs up after the content's are turned away from the inputs that the style LoRA uses; needs both.", paper="2511.11051",
        static=True, ranks="all")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    with added_up(run, lambda step, live: projected(run, live, options.mu, options.energy, options.protect)) as predict:
        yield predict
