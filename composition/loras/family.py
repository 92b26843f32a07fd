"""The kind of base a LoRA file was trained for, from its keys and shapes alone; metadata is not needed.

The clearest sign is the width of the text that cross-attention reads: 768 SD 1.x, 1024 SD 2.x, 2048 SDXL.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from composition.loras import layers as layer_map
from composition.loras.keys import Module
from composition.loras.kinds import read

WIDTHS = {768: "sd", 1024: "sd2", 2048: "sdxl"}
JOINT = ("flux", "sd3")  # transformers, which the width of their text does not tell apart
WORDS = {"sd": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "sd3": "SD 3", "flux": "FLUX"}

_TEXT = re.compile(r"attn2[._]to_[kv]$")
_DEEP = re.compile(r"transformer_blocks[._](?:[2-9]|\d\d)[._]")
_FLUX = re.compile(r"(?:^|[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]")
_JOINT = re.compile(r"(?:^|[._])transformer_blocks[._]\d+[._]attn[._]")
_OTHER_JOINT = re.compile(r"img_mlp|txt_mlp|img_mod|txt_mod")
_JOINT_WIDTHS = {3072: "flux", 1536: "sd3", 2432: "sd3"}


class Origin(NamedTuple):
    """family: as in Receipt. width: of the text it reads (cross-attention), 0 unseen. second: a UNet's two text encoders."""

    family: str
    width: int
    second: bool


def detect(modules: Sequence[Module], tensors: Mapping[str, Tensor]) -> Origin:
    """The origin of a file. family is "unknown" where keys and shapes leave it open."""
    names = [module.module for module in modules]
    second = any(module.component == "text_encoder_2" for module in modules)
    width = next((width for module in modules if _reads_text(module) and (width := _inputs(module, tensors))), 0)
    if any(_FLUX.search(name) for name in names):
        return Origin("flux", 0, False)
    if any("joint_blocks" in name for name in names):
        return Origin("sd3", 0, False)
    joint = next((module for module in modules if _JOINT.search(module.module)), None)
    if joint and not any(_OTHER_JOINT.search(name) for name in names):
        return Origin(_JOINT_WIDTHS.get(_inputs(joint, tensors), "unknown"), 0, False)
    if second:
        return Origin("sdxl", width, True)
    if not width and any(module.component == "unet" and _DEEP.search(module.module) for module in modules):
        return Origin("sdxl", 0, False)
    return Origin(WIDTHS.get(width, "unknown"), width, False)


def foreign(origin: Origin, components: Mapping[str, nn.Module], family: str) -> str:
    """Why the file is not a LoRA for this base, in plain words, or ""."""
    width = text_width(components)
    if family in JOINT:
        differs = origin.family not in (family, "unknown") or bool(origin.width)
    elif origin.family in JOINT or (origin.second and family != "sdxl"):
        differs = True
    elif origin.width and width:
        differs = origin.width != width
    else:
        differs = origin.family == "sdxl" and family != "sdxl"
    if not differs:
        return ""
    model = WORDS.get(origin.family, "another model") + (f" (text width {origin.width})" if origin.width else "")
    return f"made for {model}; this base is {base(components, family)}"


def base(components: Mapping[str, nn.Module], family: str) -> str:
    """"SD with text width 768"."""
    width = text_width(components)
    return family.upper() + (f" with text width {width}" if width else "")


def text_width(components: Mapping[str, nn.Module]) -> int:
    """Width of the text embeddings the base's cross-attention reads; 0 when it has none."""
    layers = layer_map.layers(components["unet"]) if "unet" in components else {}
    return next((layer_map.shape(layer)[1] for path, layer in layers.items() if _TEXT.search(path)), 0)


def _reads_text(module: Module) -> bool:
    """Number 6 of a first-generation file is attn2's to_k or to_v in every order such files have."""
    reads = module.module == "#6" or bool(_TEXT.search(module.module))
    return reads and module.component == "unet"


def _inputs(module: Module, tensors: Mapping[str, Tensor]) -> int:
    return read.inputs({role: tensors[key] for role, key in module.keys.items()})
