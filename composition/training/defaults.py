"""What usually works, by the size of the model: where a training starts when the user says nothing."""

from dataclasses import dataclass

import torch

from composition.backbones.base import Backbone
from composition.loras.condition import OFFSET

SMALL = 100_000_000  # parameters of a denoiser that learns within minutes on a processor


@dataclass(frozen=True)
class TrainingDefaults:
    """rank .. keep: as in Plan. views: how many of each picture, `most` in all. checkpointing: of gradients."""

    rank: int
    rate: float
    steps: int
    batch: int
    targets: tuple[str, ...]
    noise: tuple[float, float] | None
    keep: float
    views: int
    most: int
    checkpointing: bool

    def count(self, pictures: int) -> int:
        """Views of a folder of so many pictures."""
        return max(pictures, min(self.views * pictures, self.most))


def of(backbone: Backbone) -> TrainingDefaults:
    """For this model."""
    if sum(p.numel() for p in backbone.denoiser.parameters()) < SMALL:
        return TrainingDefaults(8, 2e-3, 250, 16, ("attention", "feed_forward", "convolution"), (0.0, 1.1), 0.15, 64, 640, False)
    if backbone.family in ("sdxl", "sd3", "flux"):
        return TrainingDefaults(16, 1e-4, 1000, 1, ("attention", "feed_forward"), None, 0.2, 8, 200, True)
    return TrainingDefaults(16, 1e-4, 1000, 2, ("attention", "feed_forward"), None, 0.2, 16, 400, False)


@dataclass(frozen=True)
class ConditionDefaults:
    """rank .. noise: as in ConditionPlan. size: of a condition picture, and sides: of the pictures, in pixels. bias, offset: as in Settings. count: views in all."""

    rank: int
    rate: float
    steps: int
    batch: int
    views: int
    noise: tuple[float, float] | None
    size: int
    sides: tuple[int, ...]
    bias: float
    offset: int
    count: int
    checkpointing: bool


def of_condition(backbone: Backbone) -> ConditionDefaults:
    """For this model: a small one begins with its condition hardly seen, a large one as the published LoRAs do, at a size that it learns fast at."""
    side = backbone.pipeline.vae.config.sample_size
    if sum(p.numel() for p in backbone.denoiser.parameters()) < SMALL:
        return ConditionDefaults(16, 3e-3, 400, 4, 4, (0.8, 1.2), 3 * side // 4, (3 * side // 4, side, 5 * side // 4), -2.0, 16, 640, False)
    return ConditionDefaults(128, 1e-4, 20_000, 1, 1, None, 512, (384, 512, 640), 0.0, OFFSET, 2000, True)


def halves(device: torch.device, base: torch.dtype) -> bool:
    """True when products in bfloat16 are fast here, or the base is stored so: a fact of the machine, not of the model."""
    if base == torch.bfloat16:
        return True
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def dtype_for(device: str | None, wanted: str | None) -> str | None:
    """The base's number type: as wanted, else bfloat16 on a GPU that has it (half precision overflows in training)."""
    if wanted is None and device not in ("cpu", "mps") and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return wanted or "float32"
