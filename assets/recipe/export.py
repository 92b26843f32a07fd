"""The export: stock Stable Diffusion and FLUX folders in half precision that need none of this project's code.

The second base's weights keep bfloat16's 8 significant bits of float16's 11, so that the package, which is compressed, is 5 MB smaller.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, T5Tokenizer

from . import flux
from .base import Denoiser, scheduler
from .flux import Flow


def export(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write ``folder``; the models' weights are rounded to half precision in place.

    The denoiser is cut into files of at most 15 MB.
    """
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=model.text, tokenizer=tokenizer, unet=model.unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder, max_shard_size="15MB")
    settle_text(folder / "text_encoder")
    tidy(folder)


def export_flux(model: Flow, vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5Tokenizer, folder: Path) -> None:
    """Write ``folder``, a stock FluxPipeline; the models' weights are rounded in place, to bfloat16's numbers in float16.

    The transformer is cut into files of at most 15 MB.
    """
    pipe = FluxPipeline(
        vae=vae, text_encoder=model.text.clip, tokenizer=clip, text_encoder_2=model.text.t5, tokenizer_2=t5,
        transformer=model.transformer, scheduler=flux.scheduler(),
    )  # fmt: skip
    pipe.to(torch.float16)
    with torch.no_grad():
        for part in (vae, model.text, model.transformer):
            for weight in part.parameters():
                weight.copy_(weight.bfloat16())
    pipe.save_pretrained(folder, max_shard_size="15MB")
    settle_text(folder / "text_encoder")
    config = folder / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    tidy(folder)


def tidy(folder: Path) -> None:
    """Nothing of this machine in the folder: no paths, plain rights."""
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    for file in folder.rglob("*.json"):
        facts = json.loads(file.read_text())
        if facts.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def settle_text(folder: Path) -> None:
    """Name the keys as every version of transformers reads them, and request loading in single precision.

    transformers 5 keeps a file's own dtype: half text beside a single UNet would crash the stock call.
    """
    file = folder / "model.safetensors"
    weights = load_file(file)
    prefixed = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in weights.items()}
    save_file(prefixed, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
