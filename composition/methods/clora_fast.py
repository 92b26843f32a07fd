"""CLoRA without gradients and in one pass: masks read early, then every LoRA's deltas at its own place (after CLoRA, arXiv 2403.19776,
and the two-phase routing of FreeFuse, arXiv 2510.23515).

In the first steps the base says where each concept's words are looked at, in a pass that ends after the layers that tell it; the masks
are kept from then on. The prediction is one evaluation, each LoRA gated by its mask, each prompt read where its concept is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from composition import masks
from composition.methods import clora, method
from composition.run import Run, grid
from composition.sampler import Predict, Prediction, Step


@dataclass(frozen=True)
class Options:
    read: float = field(default=0.3, metadata={"ge": 0.0, "le": 1.0, "help": "Share of the steps in which masks are read; at least one step."})
    ask: Literal["base", "each"] = field(default="base", metadata={"help":
        "Who is asked where the words are: the base alone, or each concept's LoRA, which costs a pass more for each."})
    threshold: float = field(default=0.4, metadata={"ge": 0.0, "le": 1.0, "help": "Share of a map's maximum from which a place is the concept's."})
    smooth: float = field(default=0.0, metadata={"ge": 0.0, "le": 8.0, "help": "Blur of the maps, in their own places."})
    closing: bool = field(default=True, metadata={"help": "Fill holes and clefts of a mask."})
    grow: int = field(default=0, metadata={"ge": 0, "le": 32, "help": "Places of the maps' grid by which a mask is widened on every side."})
    overlap: Literal["average", "argmax"] = field(default="argmax", metadata={"help":
        "Where concepts meet: share the place, or give it to the one that looks there most."})
    soft: float = field(default=0.0, metadata={"ge": 0.0, "le": 16.0, "help": "Softness of a mask's edge, in places of the latent."})
    regions: Literal["replace", "intersect"] = field(default="replace", metadata={"help": "What a LoRA's own region does with its mask."})


@method(title="CLoRA fast", about="Every concept keeps its own place, in about one evaluation a step.", paper="2403.19776",
        cost="about 1.1", single=False, placing=True)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    scene, layers = clora.taken_apart(run), run.backbone.watched()
    positions = clora.positions(run, scene)
    run.notes["clora"] = {"prompts": list(scene.prompts), "everywhere": list(scene.everywhere)}
    kept: dict[tuple[int, ...], Float[Tensor, "B K h w"]] = {}

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        concepts = tuple(index for index, name in enumerate(scene.concepts) if name in live)
        if not concepts:
            return Prediction(run.guide(run.denoise(step)), step.latents)
        passes = clora.passes_of(run, scene, live, concepts)
        if concepts not in kept or step.index < options.read * step.count:
            kept[concepts] = read(step, passes, concepts)
        size = grid(step, 0)
        shared = masks.shares(masks.resized(kept[concepts], size, soft=options.soft)).to(step.latents.dtype)
        return Prediction(run.guide(run.denoise_placed(step, passes, shared)), step.latents)

    def read(step: Step, passes: Sequence, concepts: Sequence[int]) -> Float[Tensor, "B K h w"]:
        asked = passes[:1] if options.ask == "base" else passes[1:]
        maps = run.attend(step, asked, layers)[:, -1]
        own = [maps[0][:, positions[c][0]] if options.ask == "base" else maps[k][:, positions[c][c + 1]] for k, c in enumerate(concepts)]
        own = [masks.blurred(one, options.smooth) if options.smooth else one for one in own]
        names = [scene.concepts[c] for c in concepts]
        places, strength = clora.placed_by(own, options, names, run)
        clora.tell(run, names, strength, places)
        return places.detach()

    with torch.no_grad():
        yield predict
