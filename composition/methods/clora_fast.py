"""CLoRA without gradients and in one pass: masks read early, then every LoRA's deltas at its own place (after CLoRA, arXiv 2403.19776,
and the two-phase routing of FreeFuse, arXiv 2510.23515).

In the first steps masks are read; they are kept from then on. With cross-attention the base says where each concept's words are looked
at, in a pass that ends after the layers that tell it. In joint attention (SD 3, FLUX) those maps tell little of words that the base does
not know, so there three of the steps ask the base and each concept's LoRA apart, as CLoRA does, and a place is the LoRA's that changes the
base's prediction most. Every other prediction is one evaluation, each LoRA gated by its mask, each prompt read where its concept is.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from composition.hooks import masks
from composition.loop import Predict, Prediction, Step
from composition.methods import clora, method
from composition.run import Pass, Run

READINGS = 3  # steps of the first ones in which every LoRA is asked apart


@dataclass(frozen=True)
class Options:
    read: float = field(default=0.3, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the steps in which masks are read; at least one step. Of change they are read at its first, middle and last step."})
    ask: Literal["auto", "base", "each", "change"] = field(default="auto", metadata={"help":
        "What tells a concept's place: where its words are looked at, by the base alone or by each concept's LoRA, which costs a pass more for "
        "each; or where its LoRA changes the base's prediction most. auto: base, and change for SD 3 and FLUX."})
    threshold: float = field(default=0.4, metadata={"ge": 0.0, "le": 1.0, "help": "Share of a map's maximum from which a place is the concept's."})
    smooth: float | None = field(default=None, metadata={"ge": 0.0, "le": 8.0, "help":
        "Blur of the maps, in their own places; empty: none, and an eighth of the picture's shorter side for maps of change."})
    closing: bool = field(default=True, metadata={"help": "Fill holes and clefts of a mask."})
    grow: int = field(default=0, metadata={"ge": 0, "le": 32, "help": "Places of the maps' grid by which a mask is widened on every side."})
    overlap: Literal["average", "argmax"] = field(default="argmax", metadata={"help":
        "Where concepts meet: share the place, or give it to the one that looks there most."})
    soft: float = field(default=0.0, metadata={"ge": 0.0, "le": 16.0, "help": "Softness of a mask's edge, in places of the latent."})
    regions: Literal["replace", "intersect"] = field(default="replace", metadata={"help": "What a LoRA's own region does with its mask."})


@method(title="CLoRA fast", about="Every concept keeps its own place, in about one evaluation a step.", paper="2403.19776",
        cost="about 1.1 (SD 3 and FLUX: 1 + 3 K / steps)", single=False, regional=True)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    scene, layers = clora.taken_apart(run), run.backbone.localizing_layers()
    positions = clora.positions(run, scene)
    ask = options.ask if options.ask != "auto" else "change" if run.backbone.joint else "base"
    run.notes["clora"] = {"prompts": list(scene.prompts), "everywhere": list(scene.everywhere), "maps": ask}
    kept: dict[tuple[int, ...], Float[Tensor, "B K h w"]] = {}

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        concepts = tuple(index for index, name in enumerate(scene.concepts) if name in live)
        if not concepts:
            return Prediction(run.guide(run.denoise(step)), step.latents)
        passes = clora.passes_of(run, scene, live, concepts)
        names = [scene.concepts[c] for c in concepts]
        values = None
        if concepts not in kept or reading(step):
            if ask == "change":
                values = run.denoise_passes(step, passes)
                kept[concepts], strength = clora.placed_by_change(run, step, values, options, names)
            else:
                kept[concepts], strength = clora.placed_by(seen(step, passes, concepts), options, names, run)
            clora.tell(run, names, strength, kept[concepts])
        shared = clora.shared_places(step, kept[concepts], options.soft)
        rows = run.denoise_regional(step, passes, shared) if values is None else clora.fused(values, shared)
        return Prediction(run.guide(rows), step.latents)

    def reading(step: Step) -> bool:
        return step.index in readings(options.read, step.count) if ask == "change" else step.index < options.read * step.count

    def seen(step: Step, passes: Sequence[Pass], concepts: Sequence[int]) -> list[Float[Tensor, "B _T h w"]]:
        """The attention maps of each concept's tokens, blurred as the options say."""
        asked = passes[:1] if ask == "base" else passes[1:]
        maps = run.attend(step, asked, layers)[:, -1]
        own = [maps[0][:, positions[c][0]] if ask == "base" else maps[k][:, positions[c][c + 1]] for k, c in enumerate(concepts)]
        return [masks.blurred(one, options.smooth) if options.smooth else one for one in own]

    with torch.no_grad():
        yield predict


def readings(share: float, count: int) -> set[int]:
    """The steps of `count` in which changes are read: the first, the last below this share of them, and those evenly between."""
    last = max(math.ceil(share * count) - 1, 0)
    return {last * turn // (READINGS - 1) for turn in range(READINGS)}
