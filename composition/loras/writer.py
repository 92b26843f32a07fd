"""A trained LoRA as a file: standard safetensors in the diffusers layout, with what the library shows in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from composition import atomic
from composition.loras.kinds.lora import Factors


def write(
    file: Path, factors: Mapping[str, Mapping[str, Factors]], rank: int, alpha: float | None,
    metadata: Mapping[str, str], dtype: torch.dtype = torch.float16,
) -> None:
    """Write the factors by component and layer path.

    The file appears whole or not at all. alpha other than rank is stated in the header as diffusers states it, and `up`
    divided by it; text encoders' keys carry "text_model.", which every transformers reads.
    """
    tensors: dict[str, Tensor] = {}
    header = {"format": "pt", **metadata}
    scale = (alpha or rank) / rank
    settings: dict[str, object] = {}
    for component, layers in factors.items():
        text = component.startswith("text_encoder")
        for path, layer in layers.items():
            down, up = layer.down, layer.up
            path = f"text_model.{path.removeprefix('text_model.')}" if text else path
            wide = up[(..., *[None] * (down.ndim - 2))].cpu() / scale
            tensors[f"{component}.{path}.lora_A.weight"] = down.to("cpu", dtype).contiguous()
            tensors[f"{component}.{path}.lora_B.weight"] = wide.to(dtype).contiguous()
        # Without the prefix a path is the ending of the module's name in every transformers.
        short = sorted(path.removeprefix("text_model.") for path in layers)
        settings |= {f"{component}.r": rank, f"{component}.lora_alpha": alpha, f"{component}.target_modules": short}
    if scale != 1:
        header["lora_adapter_metadata"] = json.dumps(settings, sort_keys=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, ordered(save(tensors, metadata=header)))


def ordered(data: bytes) -> bytes:
    """The same file with the words of its header in order: the library shuffles them, and equal LoRAs should be equal."""
    length = int.from_bytes(data[:8], "little")
    words = json.loads(data[8 : 8 + length])
    words["__metadata__"] = dict(sorted(words["__metadata__"].items()))
    text = json.dumps(words, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
