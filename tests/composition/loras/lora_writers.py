"""LoRA files in every layout people write, from updates whose truth is known. Imports nothing of Medley.

An Update is one module's factors with its alpha; a writer spells all updates of a pipeline in one layout. The names are
built from the diffusers paths by the rules of each trainer, not by the reader's map.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import toys

RANK = 2


class Update(NamedTuple):
    """component, path in it, down (r, in, ...), up (out, r, ...), alpha: the weight changes by alpha / r * up down."""

    component: str
    path: str
    down: Tensor
    up: Tensor
    alpha: float

    def dense(self) -> Tensor:
        """The change of the weight in float64: (out, in) or (out, in, height, width)."""
        up, down = self.up.double(), self.down.double()
        rank = down.shape[0]
        total = sum(torch.tensordot(up.flatten(1)[:, k], down[k], dims=0) for k in range(rank))
        return self.alpha / rank * torch.as_tensor(total)


Written = tuple[dict[str, Tensor], dict[str, str]]
Writer = Callable[[object, Sequence[Update]], Written]


def updates(
    pipe, *, alphas: Sequence[float] = (RANK,), dtype=torch.float64, seed: int = 0, every: int = 1, only: str = ""
) -> list[Update]:
    """Random updates of every `every`-th linear and convolution whose path holds `only`; alphas are dealt in turn."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for path, module in getattr(pipe, component, nn.Module()).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and only in path:
                found.append((component, path, module))
    made = []
    for index, (component, path, module) in enumerate(found[::every]):
        shape = module.weight.shape
        down = torch.randn(RANK, *shape[1:], generator=rng, dtype=torch.float64).to(dtype)
        up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=rng, dtype=torch.float64).to(dtype)
        made.append(Update(component, path, down, up, float(alphas[index % len(alphas)])))
    return made


def _long(one: Update) -> str:
    """The path as files have it: text encoders below text_model, whatever transformers calls them today."""
    if one.component == "unet" or one.path.startswith(("text_model.", "text_projection")):
        return one.path
    return f"text_model.{one.path}"


def _write(spelled: Callable[[Update], tuple[str, str, str]]) -> Writer:
    """A writer from a function update -> (key of down, key of up, key of alpha)."""

    def write(pipe, made: Sequence[Update]) -> Written:
        tensors = {}
        for one in made:
            down, up, alpha = spelled(one)
            tensors |= {down: one.down, up: one.up, alpha: torch.tensor(one.alpha, dtype=torch.float64)}
        return tensors, {}

    return write


def _peft(prefix: str, adapter: str) -> Writer:
    def spelled(one: Update) -> tuple[str, str, str]:
        head = prefix.format(one.component) + _long(one)
        return f"{head}.lora_A{adapter}.weight", f"{head}.lora_B{adapter}.weight", f"{head}.alpha"

    return _write(spelled)


def _linear_layer(one: Update) -> tuple[str, str, str]:
    middle = ".lora" if one.component == "unet" else ".lora_linear_layer"
    head = f"{one.component}.{_long(one)}"
    return f"{head}{middle}.down.weight", f"{head}{middle}.up.weight", f"{head}.alpha"


def _kohya_prefix(pipe, one: Update) -> str:
    if one.component == "unet":
        return "lora_unet_"
    if one.component == "text_encoder_2":
        return "lora_te2_"
    return "lora_te1_" if hasattr(pipe, "text_encoder_2") else "lora_te_"


def _named(name: Callable[[object, Update], str]) -> Writer:
    def write(pipe, made: Sequence[Update]) -> Written:
        def spelled(one: Update) -> tuple[str, str, str]:
            head = name(pipe, one)
            return f"{head}.lora_down.weight", f"{head}.lora_up.weight", f"{head}.alpha"

        return _write(spelled)(pipe, made)

    return write


def _kohya(pipe, one: Update) -> str:
    return _kohya_prefix(pipe, one) + _long(one).replace(".", "_")


def _kohya_sgm(pipe, one: Update) -> str:
    name = toys.sgm_path(pipe, one.path) if one.component == "unet" else _long(one)
    return _kohya_prefix(pipe, one) + name.replace(".", "_")


def _comfyui(pipe, one: Update) -> str:
    return f"diffusion_model.{toys.sgm_path(pipe, one.path)}" if one.component == "unet" else _kohya(pipe, one)


def metadata_alphas(pipe, made: Sequence[Update]) -> Written:
    """PEFT keys without alpha tensors: a common alpha and the exceptions are in the header, as diffusers writes it."""
    tensors, _ = _peft("{}.", "")(pipe, made)
    settings = {}
    for component in {one.component for one in made}:
        mine = [one for one in made if one.component == component]
        settings[f"{component}.r"] = RANK
        settings[f"{component}.lora_alpha"] = mine[0].alpha
        settings[f"{component}.alpha_pattern"] = {_long(one): one.alpha for one in mine if one.alpha != mine[0].alpha}
    return {key: value for key, value in tensors.items() if not key.endswith("alpha")}, {
        "lora_adapter_metadata": json.dumps(settings)
    }


WRITERS: dict[str, Writer] = {
    "peft": _peft("{}.", ""),
    "peft-default": _peft("{}.", ".default"),
    "peft-base-model": _peft("base_model.model.{}.", ""),
    "peft-base-inside": _peft("{}.base_model.model.", ".default"),
    "peft-header": metadata_alphas,
    "linear-layer": _write(_linear_layer),
    "kohya": _named(_kohya),
    "kohya-sgm": _named(_kohya_sgm),
    "comfyui": _named(_comfyui),
}


def processors(made: Sequence[Update], prefix: str = "unet.") -> Written:
    """The first diffusers layout: attention linears only, below their processor; no alpha, so it must be the rank."""
    tensors = {}
    for one in made:
        path, part = one.path.rsplit(".to_", 1)
        head = f"{prefix}{path}.processor.to_{part.removesuffix('.0')}_lora"
        tensors |= {f"{head}.down.weight": one.down, f"{head}.up.weight": one.up}
    return tensors, {}


def save(path: Path, written: Written) -> Path:
    save_file({key: value.contiguous().clone() for key, value in written[0].items()}, path, metadata=written[1] or None)
    return path
