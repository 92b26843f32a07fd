"""Denoisers of true size with random weights, made on the device itself, with their LoRA files and inputs; toys when tiny."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import composition
from composition import Lora, backbones
from composition.adapters import Adapters
from composition.backbones.base import Backbone
from composition.loop import Conditioning
from tests import toys
from tests.bench import cmlora as bench
from tests.bench.regional import ENDS


@dataclass(frozen=True)
class Size:
    """name: for people. rows: of one evaluation (2 with guidance). side: of the latents. tokens: of a prompt. ends: the layers with LoRAs."""

    name: str
    family: str
    rows: int
    side: int
    tokens: int
    ends: tuple[str, ...]
    build: Callable[[], nn.Module]

    @property
    def component(self) -> str:
        return "transformer" if self.family == "flux" else "unet"


def _unet(name: str) -> nn.Module:
    config = Path(composition.__file__).parent / f"backbones/loading/configs/{name}/unet/config.json"
    return UNet2DConditionModel.from_config(json.loads(config.read_text(encoding="utf-8")))


SIZES = (
    Size("SD1.5 512 px", "sd", 2, 64, 77, bench.ATTENTION, functools.partial(_unet, "sd15")),
    Size("SDXL 1024 px", "sdxl", 2, 128, 77, bench.ATTENTION, functools.partial(_unet, "sdxl")),
    Size("FLUX.1-dev 1024 px", "flux", 1, 128, 512, ENDS, functools.partial(FluxTransformer2DModel, guidance_embeds=True)),
)
TOYS = (
    Size("toy SD", "sd", 2, 16, 77, bench.ATTENTION, lambda: toys.sd().unet),
    Size("toy SDXL", "sdxl", 2, 16, 77, bench.ATTENTION, lambda: toys.sdxl().unet),
    Size("toy FLUX", "flux", 1, 16, 24, ENDS, lambda: toys.flux_distilled().transformer),
)


class Model:
    """One denoiser on the device, its backbone, and what it reads. files: a LoRA each, of random factors."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, torch.device(device), dtype
        with _born(self.device, dtype):
            self.denoiser: Any = nn.Module.to(size.build(), self.device, dtype).eval().requires_grad_(False)
        self.backbone = self._around(self.denoiser)

    def _around(self, denoiser: nn.Module) -> Backbone:
        """The backbone of a pipeline that has this denoiser and nothing else."""
        pipeline = SimpleNamespace(scheduler=None, vae_scale_factor=8, _execution_device=self.device, **{self.size.component: denoiser})
        return backbones.of(pipeline, self.size.family)

    def twin(self) -> Backbone:
        """Another denoiser with the same weights, not copied: what is injected into it leaves this one alone."""
        with torch.device("meta"):
            other = type(self.denoiser).from_config(self.denoiser.config)
        other.load_state_dict(self.denoiser.state_dict(), assign=True)
        return self._around(other.eval().requires_grad_(False))

    def adapters(self) -> Adapters:
        backbone = self.backbone
        return Adapters({self.size.component: self.denoiser}, family=self.size.family, block=backbone.block, axis=backbone.axis)

    def loras(self, folder: Path, count: int) -> list[tuple[str, Lora, Path]]:
        """`count` files in the folder, each written once, as a session of adapters takes them."""
        files = [folder / f"{self.size.family}{k}.safetensors" for k in range(count)]
        for k, file in enumerate(files):
            if not file.is_file():
                bench.lora(self.denoiser, file, k, self.size.component, self.size.ends)
        return [(file.stem, Lora(file.stem), file) for file in files]

    def inputs(self, rows: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Random latents (1, C, H, W), a time, and what `rows` rows read; every row reads another prompt."""
        config, side = self.denoiser.config, self.size.side
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        if self.size.family == "flux":
            channels, width = config.in_channels // 4, config.joint_attention_dim
            more = {"pooled": drawn(rows, 1, config.pooled_projection_dim), "guidance": torch.full((rows, 1), 3.5, device=self.device)}
        else:
            channels, width, more = config.in_channels, config.cross_attention_dim, {}
            if self.size.family == "sdxl":
                more = {"pooled": drawn(rows, 1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)}
        values = {"text": drawn(rows, 1, self.size.tokens, width), **more}
        return drawn(1, channels, side, side), torch.tensor(500.0, device=self.device), Conditioning(values)


@contextmanager
def _born(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Weights are made on the device and in this type: 12 billion of them in float32 would not fit beside their bfloat16."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def one_hot(names: Sequence[str], rows: int) -> list[dict[str, float]]:
    """`rows` rows for each LoRA, with it alone."""
    return [{name: 1.0} for name in names for _ in range(rows)]


def gap(value: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference over that of the expected."""
    difference = (value.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt())


def stock(denoiser: Any, component: str, loras: Sequence[tuple[str, Lora, Path]]) -> None:
    """The same files as PEFT layers, all of them on at weight 1, as diffusers loads them."""
    for name, _, file in loras:
        denoiser.load_lora_adapter(str(file), prefix=component, adapter_name=name)
    denoiser.set_adapters([name for name, _, _ in loras], [1.0] * len(loras))
