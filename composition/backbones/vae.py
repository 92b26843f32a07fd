"""Latents to pictures and back, by a pipeline's own autoencoder."""

from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


@torch.no_grad()
def decode(pipeline: Any, latents: Float[Tensor, "B C H W"]) -> list[Image.Image]:
    """The pictures of latents as the denoiser sees them. One at a time: the same bytes whatever the batch, and less memory."""
    vae = pipeline.vae
    raised = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if raised:
        vae.to(torch.float32)
    try:
        latents = latents.to(vae.dtype)
        mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        scaled = latents / vae.config.scaling_factor
        if mean is not None and deviation is not None:
            column = (1, -1, 1, 1)
            scaled = scaled * latents.new_tensor(deviation).view(column) + latents.new_tensor(mean).view(column)
        elif shift := getattr(vae.config, "shift_factor", None):
            scaled = scaled + shift
        pixels = torch.cat([vae.decode(one, return_dict=False)[0] for one in scaled.split(1)])
    finally:
        if raised:
            vae.to(torch.float16)
    return pipeline.image_processor.postprocess(pixels, output_type="pil")


def fitting(size: tuple[int, int], unit: int) -> str:
    """What to say of a size that is no multiple of `unit` pixels, "" when it is."""
    if not (size[0] % unit or size[1] % unit):
        return ""
    near = tuple(max(unit, round(side / unit) * unit) for side in size)
    return f"size {size[0]}x{size[1]}: width and height must be multiples of {unit}; {near[0]}x{near[1]} is the nearest"
