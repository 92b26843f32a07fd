"""Latents to pictures and pictures to latents, by a pipeline's own autoencoder, and the scaling between its numbers and the denoiser's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor

from composition.loop import NotFinite


def scaled(vae: Any, coded: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The autoencoder's numbers as the denoiser sees them: centred and brought to a spread of about 1."""
    shift, spread = _scaling(vae, coded)
    return (coded - shift) * spread


def unscaled(vae: Any, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The inverse of `scaled`."""
    shift, spread = _scaling(vae, latents)
    return latents / spread + shift


def _scaling(vae: Any, like: Tensor) -> tuple[Float[Tensor, "1 C 1 1"] | float, Float[Tensor, "1 C 1 1"] | float]:
    """(shift, spread): as the configuration says, by channel where it has means and deviations."""
    config = vae.config
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and deviation is not None:
        column = (1, -1, 1, 1)
        return like.new_tensor(mean).view(column), config.scaling_factor / like.new_tensor(deviation).view(column)
    return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor


@torch.no_grad()
def encode(pipeline: Any, pixels: Float[Tensor, "n 3 height width"], part: int = 64) -> Float[Tensor, "n C H W"]:
    """Pictures in -1..1 as the denoiser sees them, in single precision at least, where the pipeline computes. part: how many at a time."""
    device = torch.device(pipeline._execution_device)
    with _whole(pipeline.vae) as vae:
        coded = torch.cat([vae.encode(some.to(device, vae.dtype)).latent_dist.mode() for some in pixels.split(part)])
    return scaled(vae, coded.to(torch.promote_types(coded.dtype, torch.float32)))


@torch.no_grad()
def sampled(pipeline: Any, pixels: Float[Tensor, "B 3 height width"], generators: Sequence[Generator]) -> Float[Tensor, "B C H W"]:
    """Pictures in -1..1 as the denoiser sees them, drawn as the stock pipelines draw them from what the autoencoder says: by each one's
    generator, so that the same seed gives the same latents. One at a time, as `decode`."""
    device = torch.device(pipeline._execution_device)
    coded = []
    with _whole(pipeline.vae) as vae:
        for single, generator in zip(pixels.split(1), generators, strict=True):
            spread = vae.encode(single.to(device, vae.dtype)).latent_dist
            wide = torch.promote_types(spread.mean.dtype, torch.float32)
            coded.append(spread.mean.to(wide) + spread.std.to(wide) * randn_tensor(spread.mean.shape, generator=generator, device=device, dtype=wide))
    return scaled(pipeline.vae, torch.cat(coded))


@torch.no_grad()
def decode(pipeline: Any, latents: Float[Tensor, "B C H W"]) -> list[Image.Image]:
    """The pictures of latents as the denoiser sees them. One at a time: the same bytes whatever the batch, and less memory.

    Raises NotFinite for what would be a black picture.
    """
    with _whole(pipeline.vae) as vae:
        coded = unscaled(vae, latents.to(vae.dtype))
        pixels = torch.cat([vae.decode(single, return_dict=False)[0] for single in coded.split(1)])
    if not torch.isfinite(pixels).all():
        raise NotFinite
    return pipeline.image_processor.postprocess(pixels, output_type="pil")


@contextmanager
def _whole(vae: Any) -> Iterator[Any]:
    """The autoencoder in single precision while it lasts, where it overflows in half."""
    # Any of its weights: an interruption while it was cast leaves it in part as it was.
    raised = getattr(vae.config, "force_upcast", False) and any(weight.dtype == torch.float16 for weight in vae.parameters())
    try:
        if raised:
            vae.to(torch.float32)
        yield vae
    finally:
        if raised:
            vae.to(torch.float16)


def fitting(size: tuple[int, int], unit: int) -> str:
    """Why a size that is not a multiple of `unit` pixels cannot be used, "" when it can."""
    if not (size[0] % unit or size[1] % unit):
        return ""
    near = tuple(max(unit, round(side / unit) * unit) for side in size)
    return f"size {size[0]}x{size[1]}: width and height must be multiples of {unit}; {near[0]}x{near[1]} is the nearest"
