"""A LoRA as a file: standard safetensors, with what the library shows in its header.

Trained LoRAs have one rank, and are written in the diffusers layout. Those of which each layer has a rank of its own are written as most
tools read them: for UNets in kohya's layout, for transformers in diffusers'.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from composition import atomic
from composition.loras.kinds.lora import Factors
from composition.loras.layers import flat

_ORIGINAL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # of SDXL: no other name is read by all


class Written(NamedTuple):
    """A layer as it is to be written. down and up are in the number type of the file; alpha / r multiplies their product, nothing where it is None.

    path: the layer's own, or the name that the authors' code has for several layers in one.
    """

    component: str
    path: str
    down: Float[Tensor, "r in *kernel"]
    up: Float[Tensor, "out r"]
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / len(self.down)


def write(
    file: Path, factors: Mapping[str, Mapping[str, Factors]], rank: int, alpha: float | None,
    metadata: Mapping[str, str], dtype: torch.dtype = torch.float16,
) -> None:
    """Write the factors by component and layer path.

    The file appears whole or not at all. alpha other than rank is stated in the header as diffusers states it, and `up`
    divided by it; text encoders' keys carry "text_model.", which every transformers reads.
    """
    tensors: dict[str, Tensor] = {}
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
    _save(file, tensors, metadata, settings if scale != 1 else {})


def write_ranked(file: Path, layers: Sequence[Written], metadata: Mapping[str, str], *, kohya: bool) -> None:
    """Write layers of any ranks, in kohya's layout or in diffusers'. The file appears whole or not at all.

    In kohya's every alpha is the largest rank, and `up` is divided by alpha / rank: of alphas that differ the stock loader misses some. In
    diffusers' there is none, and ranks that differ are in the header, which it reads before the tensors. A layer with an alpha of its own
    keeps it, in its tensor or in the header.
    """
    if kohya:
        _save(file, _kohya(layers), metadata, {})
        return
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for component in dict.fromkeys(layer.component for layer in layers):
        mine = {_named(layer): layer for layer in layers if layer.component == component}
        for name, layer in mine.items():
            tensors[f"{component}.{name}.lora_A.weight"] = layer.down.contiguous()
            tensors[f"{component}.{name}.lora_B.weight"] = _wide(layer).contiguous()
        short = {name.removeprefix("text_model."): layer for name, layer in sorted(mine.items())}
        ranks = {_pattern(name, short): len(layer.down) for name, layer in short.items()}
        alphas = {_pattern(name, short): len(layer.down) if layer.alpha is None else layer.alpha for name, layer in short.items()}
        largest, alpha = max(ranks.values()), Counter(alphas.values()).most_common(1)[0][0]
        alpha = largest if all(layer.alpha is None for layer in short.values()) else alpha
        settings |= {f"{component}.{key}": value for key, value in {
            "r": largest, "lora_alpha": alpha, "rank_pattern": {name: rank for name, rank in ranks.items() if rank != largest},
            "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha}, "target_modules": list(short)}.items()}
    differ = any(value for key, value in settings.items() if key.endswith("rank_pattern")) or any(layer.scale != 1 for layer in layers)
    _save(file, tensors, metadata, settings if differ else {})


def _pattern(name: str, names: Collection[str]) -> str:
    """A layer's name as a pattern of PEFT, which fits ends of names: with its mark of the beginning where another name ends with it."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _kohya(layers: Sequence[Written]) -> dict[str, Tensor]:
    components = {layer.component for layer in layers}
    first = "lora_te1" if components & {"text_encoder_2", "text_encoder_3", "transformer"} else "lora_te"
    prefixes = {"unet": "lora_unet", "transformer": "lora_unet", "text_encoder": first, "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}
    largest = max(len(layer.down) for layer in layers)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        name = f"{prefixes[layer.component]}_{flat(_ORIGINAL.get(layer.path, _named(layer)))}"
        up, alpha = _wide(layer), layer.alpha
        if alpha is None:
            up, alpha = up * (len(layer.down) / largest), float(largest)
        tensors[f"{name}.lora_down.weight"] = layer.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = up.contiguous()
        tensors[f"{name}.alpha"] = next(number for dtype in (layer.up.dtype, torch.float32, torch.float64)
                                        if (number := torch.tensor(alpha, dtype=dtype)).item() == alpha or dtype == torch.float64)
    return tensors


def _named(layer: Written) -> str:
    """The layer's path as every transformers reads it."""
    clip = layer.component.startswith("text_encoder") and layer.path.startswith("encoder.layers.")
    return f"text_model.{layer.path}" if clip else layer.path


def _wide(layer: Written) -> Tensor:
    """`up` with the dimensions of a convolution where it is one."""
    return layer.up[(..., *[None] * (layer.down.ndim - 2))]


def _save(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], settings: Mapping[str, object]) -> None:
    header = {"format": "pt", **metadata}
    if settings:
        header["lora_adapter_metadata"] = json.dumps(settings, sort_keys=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, ordered(save(_apart(tensors), metadata=header)))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, which the format wants: parts of one layer may share a factor."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if (place := tensor.untyped_storage().data_ptr()) in seen else tensor
        seen.add(place)
    return apart


def ordered(data: bytes) -> bytes:
    """The same file with the words of its header in order: the library shuffles them, and equal LoRAs should be equal."""
    length = int.from_bytes(data[:8], "little")
    words = json.loads(data[8 : 8 + length])
    words["__metadata__"] = dict(sorted(words["__metadata__"].items()))
    text = json.dumps(words, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
