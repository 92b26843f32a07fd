"""What every backbone has of its stock diffusers pipeline: components, device, number type, decoding, letting go."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from composition.backbones import vae
from composition.backbones.loading.placement import Placement


class PipelineBackbone:
    """A pipeline whose denoiser is the first of `parts`; its text encoders follow, as far as it has them."""

    parts: ClassVar[tuple[str, ...]]

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

    def decode(self, latents: Float[Tensor, "B C H W"]) -> list[Image.Image]:
        return vae.decode(self.pipeline, latents)

    def release(self) -> None:
        self.pipeline.maybe_free_model_hooks()
