"""Control LoRAs as files: a LoRA of FLUX that also reads the latents of a picture, as Black Forest Labs' Canny and Depth LoRAs do.

The input projection's LoRA has twice the inputs: the picture's latents behind the noisy ones, by channel. Up factors may have a bias, and
norms of queries and keys have new weights. BFL's names and diffusers' are read. Alpha is the rank.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from composition.loras import layers as layer_map
from composition.loras.fused import Part
from composition.loras.safetensors import load_safely
from composition.refusal import Refused
from composition.request import Receipt

INPUT = "x_embedder"  # the layer that reads the picture's latents, too
_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.)?")
_ROLE = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_B\.bias)$")
_NORM = re.compile(r"(double|single)_blocks\.(\d{1,4})\.(?:(img|txt)_attn\.)?norm\.(query|key)_norm\.scale$")
_OWN_NORM = re.compile(r"(?:single_)?transformer_blocks\.\d{1,4}\.attn\.norm_(?:added_)?[qk]\.weight$")


class Change(NamedTuple):
    """Of one linear layer: up @ down of its input, and bias, which are added to its output."""

    down: Float[Tensor, "r in"]
    up: Float[Tensor, "out r"]
    bias: Float[Tensor, " out"] | None = None


@dataclass(frozen=True, eq=False)
class ControlLora:
    """changes: by path of a linear layer. norms: new weights by path of a norm. extra: numbers of a token of the picture's latents."""

    changes: Mapping[str, Change]
    norms: Mapping[str, Float[Tensor, " d"]]
    extra: int
    receipt: Receipt


def read(path: Path, transformer: Any) -> ControlLora:
    """Read one for this transformer. Raises Refused for one of which anything does not fit: it was trained as a whole."""
    raw = load_safely(path)
    parts, factors, norms = layer_map.parts("transformer", transformer), {}, {}
    for key, tensor in raw.tensors.items():
        name = _PREFIX.sub("", key)
        if role := _ROLE.search(name):
            factors.setdefault(name[: role.start()], {})[role[1]] = tensor
        elif norm := _norm(name):
            norms[norm] = tensor
        else:
            raise Refused(f"{path.name}: {key[:200]!r} is in no control LoRA for FLUX that is known")
    layers = layer_map.layers(transformer)
    changes: dict[str, Change] = {}
    for name, roles in factors.items():
        where = parts.get(layer_map.flat(name))
        if where is None:
            raise Refused(f"{path.name}: {name[:200]!r} is a layer that this model does not have")
        changes |= _changes(f"{path.name}: {name[:200]}", roles, where, layers)
    if INPUT not in changes:
        raise Refused(f"{path.name}: it does not change the input projection ({INPUT}), so it reads no picture")
    own = inputs(transformer)
    extra = changes[INPUT].down.shape[1] - own
    if extra != own:
        raise Refused(f"{path.name}: its input projection reads {extra} numbers a token beside the {own} of the latents, where a picture's latents "
                      f"are {own}" + (" (as for filling in, which is not supported)" if extra > own else ""))
    for where, weight in norms.items():
        module = _module(transformer, where)
        held = None if module is None else getattr(module, "weight", None)
        if held is None or held.shape != weight.shape:
            raise Refused(f"{path.name}: the norm {where} of this model does not take weights of shape {tuple(weight.shape)}")
    receipt = Receipt(
        name=path.stem, path=str(path), sha256=raw.sha256, tensor_sha256=raw.tensor_sha256, family="flux", layout="control-lora",
        tensors=len(raw.tensors), applied=len(raw.tensors), components={"transformer": {"tensors": len(raw.tensors), "modules": len(changes) + len(norms)}},
        ranks={rank: sum(change.down.shape[0] == rank for change in changes.values()) for rank in {change.down.shape[0] for change in changes.values()}},
        metadata=dict(raw.metadata), data_sha256=raw.data_sha256)
    return ControlLora(changes, norms, extra, receipt)


def inputs(transformer: Any) -> int:
    """Numbers of a token of the latents, as the input projection reads them."""
    return layer_map.shape(transformer.get_submodule(INPUT))[1]


def _changes(what: str, roles: Mapping[str, Tensor], where: tuple[Part, ...], layers: Mapping[str, layer_map.Layer]) -> dict[str, Change]:
    """By path, the change of each layer that a module of the file stands for."""
    down, up, bias = (roles.get(role) for role in ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
    if down is None or up is None:
        raise Refused(f"{what} is an incomplete pair")
    shapes = [layer_map.shape(layers[part.path]) for part in where]
    outputs, reads = sum(shape[0] for shape in shapes), shapes[0][1]
    fits = down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] and up.shape[0] == outputs
    if not fits or (down.shape[1] != reads if where[0].path != INPUT else down.shape[1] <= reads) or (bias is not None and bias.shape != up.shape[:1]):
        raise Refused(f"{what}: its factors {tuple(up.shape)} x {tuple(down.shape)} do not fit a layer of shape {(outputs, reads)} (out, in): it was "
                      "made for a model of another width")
    return {part.path: Change(down, part.rows(up), None if bias is None else part.rows(bias)) for part in where}


def _norm(name: str) -> str:
    """The path of the norm that a tensor is of, "" for another tensor."""
    if match := _NORM.search(name):
        kind, block, side, which = match.groups()
        return f"{'single_' if kind == 'single' else ''}transformer_blocks.{block}.attn.norm_{'added_' if side == 'txt' else ''}{which[0]}"
    return name.removesuffix(".weight") if _OWN_NORM.search(name) else ""


def _module(transformer: nn.Module, path: str) -> nn.Module | None:
    try:
        return transformer.get_submodule(path)
    except AttributeError:
        return None
