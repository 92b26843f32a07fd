"""Pictures while an adapter is in training, and the small one that goes into its file."""

import base64
import io

import torch
from PIL import Image
from torch import Generator

from composition.adapters import Adapters
from composition.backbones import samplers
from composition.backbones.base import Backbone
from composition.request import Request
from composition.run import Run
from composition.sampler import Prediction, Step, sample

SIDES = (128, 112, 96, 80, 64, 48)  # pixels
MAX_BYTES = 40_000


@torch.no_grad()
def draw(backbone: Backbone, adapters: Adapters, request: Request) -> list[Image.Image]:
    """The request's pictures, in one batch, with the adapters it names as they stand; training goes on unchanged."""
    request = request.settled(*backbone.usual)
    scheduler = samplers.make(request.sampler, backbone.scheduler, request.steps)
    run = Run(backbone, adapters, request, scheduler, generators=[Generator().manual_seed(s) for s in request.seeds])

    def predict(step: Step) -> Prediction:
        return Prediction(run.guide(run.denoise(step)), step.latents)

    with adapters.kept():
        latents, times = backbone.start(request, scheduler, run.generators)
        latents = sample(predict, scheduler, latents, times, generator=list(run.generators))
        return backbone.decode(latents)


def thumbnail(picture: Image.Image) -> str:
    """The picture as a PNG in base64: at most 128 pixels a side and 40 kB before the encoding."""
    for side in SIDES:
        small = picture.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        held = io.BytesIO()
        small.save(held, "PNG", optimize=True)
        if held.tell() <= MAX_BYTES:
            break
    return base64.b64encode(held.getvalue()).decode("ascii")
