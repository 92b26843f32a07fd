"""CLoRA without gradients and in one pass: masks from the first steps, then every LoRA gated by its mask (after CLoRA, arXiv 2403.19776,
and the two-phase routing of FreeFuse, arXiv 2510.23515).

Masks are computed in the first steps and kept from then on. With cross-attention they come from the base's attention to each concept's
words, in a pass that ends after the layers concerned. In joint attention (SD 3, FLUX) those maps say little of words that the base does
not know, so there three of the steps evaluate the base and each concept's LoRA separately, as CLoRA does, and a place is the LoRA's that
changes the base's prediction most. Every other prediction is one evaluation, each LoRA and its prompt masked to its concept.
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
from composition.methods import method
from composition.methods.shared import concepts as shared
from composition.methods.shared import fusions
from composition.run import Pass, Run

READINGS = 3  # steps of the first ones in which every LoRA is evaluated separately


@dataclass(frozen=True)
class Options:
    read: float = field(default=0.3, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the steps in which masks are computed; at least one step. From change they are computed at its first, middle and last step."})
    ask: Literal["auto", "base", "each", "change"] = field(default="auto", metadata={"help":
        "What a concept's mask is made from: the attention to its words, by the base alone or by each concept's LoRA, which costs one more pass "
        "for each; or where its LoRA changes the base's prediction most. auto: base, and change for SD 3 and FLUX."})
    threshold: float = field(default=0.4, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of a map's maximum from which a place belongs to the concept's mask."})
    smooth: float | None = field(default=None, metadata={"ge": 0.0, "le": 8.0, "help":
        "Blur of the maps, in cells of their grid; empty: none, and an eighth of the picture's shorter side for maps of change."})
    closing: bool = field(default=True, metadata={"help": "Fill holes and gaps of a mask."})
    grow: int = field(default=0, metadata={"ge": 0, "le": 32, "help": "Cells of the maps' grid by which a mask is widened on every side."})
    overlap: Literal["average", "argmax"] = field(default="argmax", metadata={"help":
        "Where masks overlap: share the place, or give it to the concept with the strongest map."})
    soft: float = field(default=0.0, metadata={"ge": 0.0, "le": 16.0, "help": "Softness of a mask's edge, in cells of the latent."})
    regions: Literal["replace", "intersect"] = field(default="replace", metadata={"help": "What a LoRA's own region does with its mask."})
    worn: bool = field(default=True, metadata={"help":
        "Let clothing and the character before it in the prompt share their places: both LoRAs act in both masks."})
    fusion: fusions.Fusion = field(default="none", metadata={"help": fusions.HELP})


@method(title="CLoRA fast", about="Every concept has its own mask, in about one evaluation a step.", paper="2403.19776",
        cost="about 1.1 (SD 3 and FLUX: 1 + 3 K / steps)", single=False, regional=True)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    scene, layers = shared.scene_of(run), run.backbone.localizing_layers()
    positions = shared.token_positions(run, scene)
    source = options.ask if options.ask != "auto" else "change" if run.backbone.joint else "base"
    run.notes["clora"] = {"prompts": scene.texts, "everywhere": list(scene.everywhere), "maps": source}
    kept: dict[tuple[int, ...], Float[Tensor, "B K h w"]] = {}

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        concepts = tuple(index for index, name in enumerate(scene.concepts) if name in live)
        factors.at(step)
        if not concepts:
            return Prediction(run.guide(run.denoise(step)), step.latents)
        passes = shared.passes_of(run, scene, live, concepts, worn=options.worn)
        names = [scene.concepts[c] for c in concepts]
        reading = concepts not in kept or step.index in readings(options.read, step.count, source)
        values = run.denoise_passes(step, passes) if reading and source == "change" else None
        if reading and (step.stage == 0 or concepts not in kept):  # one mask a step, however many evaluations it has
            if values is not None:
                kept[concepts], strength = shared.masks_from_change(run, step, values, options, names)
            else:
                kept[concepts], strength = shared.masks_from_attention(seen(step, passes, concepts), options, names, run)
            shared.note_masks(run, names, strength, kept[concepts])
        by_place = shared.latent_shares(step, kept[concepts], options.soft)
        rows = run.denoise_regional(step, passes, by_place) if values is None else shared.fused(values, by_place)
        return Prediction(run.guide(rows), step.latents)

    def seen(step: Step, passes: Sequence[Pass], concepts: Sequence[int]) -> list[Float[Tensor, "B _T h w"]]:
        """The attention maps of each concept's tokens, blurred as the options say."""
        maps = run.attention_maps(step, passes[:1] if source == "base" else passes[1:], layers)[:, -1]
        own = [maps[0][:, positions[c][0]] if source == "base" else maps[k][:, positions[c][c + 1]] for k, c in enumerate(concepts)]
        return [masks.blurred(tokens, options.smooth) if options.smooth else tokens for tokens in own]

    with torch.no_grad(), fusions.fused(run, options.fusion) as factors:
        yield predict


def readings(share: float, count: int, source: str = "change") -> set[int]:
    """The steps of `count` in which masks are computed: all below this share of them.

    From change, three of those: the first, the last and the middle one.
    """
    if source != "change":
        return {index for index in range(count) if index < share * count}
    last = max(math.ceil(share * count) - 1, 0)
    return {last * turn // (READINGS - 1) for turn in range(READINGS)}
