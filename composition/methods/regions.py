"""Regions: every LoRA that has a region acts there alone, in one evaluation; the others act everywhere.

A region is a box or a mask image of the request's LoRA. Its deltas are gated by it place by place, and its own prompt (the scene with its
trigger words at its own place) is attended to there; where regions overlap they share. Latents are not optimised, maps not used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from composition import prompts
from composition.hooks import masks
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import fusions
from composition.run import Pass, Run, grid


@dataclass(frozen=True)
class Options:
    soft: float = field(default=0.0, metadata={"ge": 0.0, "le": 16.0, "help": "Softness of a region's edge, in cells of the latent."})
    masks_from: float = field(default=0.0, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the steps before which every LoRA acts everywhere."})
    fusion: fusions.Fusion = field(default="none", metadata={"help": fusions.HELP})


@method(title="Regions", about="Every LoRA that has a region acts there alone; the others act everywhere.", regional=True)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    bounded = {name: lora for name, lora in run.loras.items() if lora.region is not None}
    scene = prompts.scene(run.spelling.prompt, bounded, run.categories, run.triggers)
    texts = dict(zip(scene.concepts, scene.prompts[1:], strict=True))
    if run.loras and not bounded:
        run.notes["no regions"] = True
    if bounded:
        run.notes["regions"] = {"prompts": dict(zip(("", *scene.concepts), scene.texts, strict=True)), "everywhere": [name for name in run.loras if name not in bounded]}

    def predict(step: Step) -> Prediction:
        live = run.live(step)
        here = [name for name in bounded if name in live]
        factors.at(step)
        if not here or step.index < options.masks_from * step.count:
            return Prediction(run.guide(run.denoise(step)), step.latents)
        everywhere = {name: weight for name, weight in live.items() if name not in bounded}
        uses = [everywhere, *({name: live[name]} | everywhere for name in here)]
        prompts_of = [scene.prompts[0], *(texts.get(name, scene.prompts[0]) for name in here)]
        passes = [Pass(use, run.encode(text, use, among=scene.prompts)) for use, text in zip(uses, prompts_of, strict=True)]
        size = grid(step, 0)
        places = torch.stack([masks.region(bounded[name], size) for name in here]).to(step.latents)[None]
        if options.soft:
            places = masks.blurred(places, options.soft)
        run.notes["masks"] = {name: {"mask": masks.as_bytes(places[0, k])} for k, name in enumerate(here)}
        shares = masks.shares(places).expand(step.latents.shape[0], -1, -1, -1)
        return Prediction(run.guide(run.denoise_regional(step, passes, shares)), step.latents)

    with fusions.fused(run, options.fusion) as factors:
        yield predict
