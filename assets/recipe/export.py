"""The export: a stock Stable Diffusion folder in half precision that needs none of this project's code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from .base import Denoiser, scheduler


def export(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write ``folder``; weights are rounded to half precision here, the models given are changed so."""
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=model.text, tokenizer=tokenizer, unet=model.unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder)
    settle_text(folder / "text_encoder")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    for file in folder.rglob("*.json"):
        facts = json.loads(file.read_text())
        if facts.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def settle_text(folder: Path) -> None:
    """Name the keys as every transformers reads them, and ask to be loaded in single precision.

    transformers 5 keeps a file's own dtype: half text beside a single UNet would crash the stock call.
    """
    file = folder / "model.safetensors"
    weights = load_file(file)
    prefixed = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in weights.items()}
    save_file(prefixed, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
