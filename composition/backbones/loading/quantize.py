"""Large bases in little memory: weights quantized while they are loaded, or a denoiser's file that is quantized already (GGUF).

diffusers' and transformers' own configurations do it; LoRAs act on a layer's output and need not know. Quantised are the denoiser and
T5, which have nearly all the weights.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from composition.refusal import Refused


class Kind(NamedTuple):
    """package: what must be installed. needs: "" or "cuda". about: for people."""

    package: str
    needs: str
    about: str


KINDS: Mapping[str, Kind] = {
    "nf4": Kind("bitsandbytes", "cuda", "4 bits a weight"),
    "8bit": Kind("bitsandbytes", "cuda", "8 bits a weight, outliers in half precision"),
    "int8": Kind("torchao", "", "8 bits a weight, whole numbers"),
    "fp8": Kind("torchao", "", "8 bits a weight, floating point"),
}
LARGE = ("unet", "transformer", "text_encoder_2", "text_encoder_3")  # T5 where it is one of these


def check(kind: str | None, device: torch.device) -> None:
    """Raises Refused for a kind that is unknown, not installed, or needs another device."""
    if kind is None:
        return
    if kind not in KINDS:
        raise Refused(f"there is no quantisation {kind!r}: it is one of " + ", ".join(f"{name} ({other.about})" for name, other in KINDS.items()))
    scheme = KINDS[kind]
    if find_spec(scheme.package) is None:
        raise Refused(f"quantisation {kind} needs {scheme.package}: pip install {scheme.package}")
    if scheme.needs and device.type != scheme.needs:
        others = " or ".join(name for name, other in KINDS.items() if not other.needs)
        raise Refused(f"quantisation {kind} needs a CUDA device, this one is {device}: use {others}")


def config(kind: str, parts: Mapping[str, str], dtype: torch.dtype) -> Any:
    """diffusers' configuration for a pipeline whose components are from these libraries ("diffusers", "transformers")."""
    import diffusers
    import transformers

    def configured(library: Any) -> Any:
        if kind == "nf4":
            return library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        if kind == "8bit":
            return library.BitsAndBytesConfig(load_in_8bit=True)
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        return library.TorchAoConfig({"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]())

    libraries = {"diffusers": diffusers, "transformers": transformers}
    return diffusers.PipelineQuantizationConfig(quant_mapping={
        name: configured(libraries[library]) for name, library in parts.items() if library in libraries})


def denoiser(file: Path, cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A denoiser from a file of its weights alone, GGUF or safetensors, with the configuration of the model in `folder`.

    Raises Refused when it cannot be read or does not fit.
    """
    import diffusers

    if not file.is_file() or file.suffix.lower() not in (".gguf", ".safetensors"):
        raise Refused(f"{file} is not a .gguf or .safetensors file of a denoiser")
    extra = {}
    if file.suffix.lower() == ".gguf":
        if find_spec("gguf") is None:
            raise Refused(f"{file.name} needs gguf: pip install gguf")
        extra["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    try:
        return cls.from_single_file(str(file), config=str(folder), subfolder="transformer", dtype=dtype, local_files_only=True, **extra)
    except Exception as error:  # whatever it holds
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{file.name} does not fit this model's denoiser ({reason}): give the file of a denoiser of the same kind") from None


def quantized(module: nn.Module) -> bool:
    """True for a model whose weights must not be cast: they are packed."""
    return bool(getattr(module, "hf_quantizer", None) or getattr(module, "is_quantized", False))


def size(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of its weights: as they are when quantized, else in this number type."""
    packed = quantized(module)
    return sum(weight.numel() * (weight.element_size() if packed else dtype.itemsize) for weight in module.parameters())
