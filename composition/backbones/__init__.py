"""The model families. `open` turns a name, a folder, a file or a hub id into a Backbone.

What belongs here: one class per family, and what they share. What does not: hooks, methods. May import composition.loop and what lies below it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads names from below here without loading torch
    from composition.backbones.base import Backbone


def open(
    source: str, *, device: str | None = None, dtype: str | None = None, offload: str = "auto", quantize: str | None = None,
    denoiser: str | None = None, vae: str | None = None,
) -> "Backbone":
    """Find, load and place a model; `loading.open`, `.quantize` and `.placement` say what may be refused."""
    from composition.backbones.loading import open as opening
    from composition.backbones.loading import placement
    from composition.backbones.loading import quantize as quantization
    from composition.backbones.loading import vae as autoencoders

    where = opening.find(source)
    family = opening.family(where)
    plan = placement.choose(device, dtype, offload, family=family)
    quantization.check(quantize, plan.device)
    pipeline = opening.load(where, plan.dtype, quantize=quantize, denoiser=Path(denoiser).expanduser() if denoiser else None)
    sha256 = autoencoders.replaced(pipeline, vae, plan.dtype) if vae else ""
    backbone = of(pipeline, family, placement.place(pipeline, plan))
    backbone.vae_sha256 = sha256
    return backbone


def of(pipeline: Any, family: str, placement: Any = None) -> "Backbone":
    """The backbone of an open stock pipeline of this family."""
    from composition.backbones.flux import FluxBackbone
    from composition.backbones.sd3 import SD3Backbone
    from composition.backbones.unet import UNetBackbone

    if family == "flux":
        return FluxBackbone(pipeline, placement)
    return SD3Backbone(pipeline, placement) if family == "sd3" else UNetBackbone(pipeline, family, placement)
