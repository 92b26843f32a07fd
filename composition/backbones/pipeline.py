"""What every backbone has of its stock diffusers pipeline: components, device, number type, decoding, letting go."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor, nn

from composition.backbones import vae
from composition.backbones.loading.placement import Placement


class PipelineBackbone:
    """A pipeline whose denoiser is the first of `parts`; its text encoders follow, as far as it has them."""

    parts: ClassVar[tuple[str, ...]]
    vae_sha256 = ""

    def __init__(self, pipeline: Any, placement: Placement | None = None) -> None:
        self.pipeline = pipeline
        self.placement = placement
        self.denoiser: Any = getattr(pipeline, self.parts[0])
        self.scheduler = pipeline.scheduler

    @property
    def components(self) -> Mapping[str, nn.Module]:
        modules = {name: getattr(self.pipeline, name, None) for name in self.parts}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def writable(self) -> bool:
        return self.placement is None or self.placement.offload in ("none", "model")

    def noise(self, shape: tuple[int, ...], generators: Sequence[Generator]) -> Float[Tensor, "B C H W"]:
        """Standard normal noise, a generator for each picture, drawn in float32 at least and then rounded to the model's dtype.

        In half precision some releases of PyTorch (2.11) draw other numbers from the same seed, and so another picture.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        return randn_tensor(shape, generator=list(generators), device=self.device, dtype=wide).to(self.dtype)

    def first(self, steps: int, strength: float) -> int:
        """Of flows: as StableDiffusion3Img2ImgPipeline and FluxImg2ImgPipeline have it."""
        return min(int(max(steps - min(steps * strength, steps), 0)), steps - 1)

    def encode_pixels(self, pixels: Float[Tensor, "B 3 height width"], generators: Sequence[Generator]) -> Float[Tensor, "B C H W"]:
        return vae.sampled(self.pipeline, pixels, generators).to(self.dtype)

    def decode(self, latents: Float[Tensor, "B C H W"]) -> list[Image.Image]:
        return vae.decode(self.pipeline, latents)

    def release(self) -> None:
        self.pipeline.maybe_free_model_hooks()
