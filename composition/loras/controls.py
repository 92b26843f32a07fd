"""What a file or folder that controls a picture is, by its names alone: a ControlNet, a control LoRA, or one of their kin.

Only the first two are applied; for every other kind there is a sentence that says what it is.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

from composition import untrusted
from composition.loras.safetensors import ENDING, load_header
from composition.refusal import Refused

Kind = Literal["", "controlnet", "control-lora"]
CONFIG = "config.json"


class Found(NamedTuple):
    """kind: "" for none of these. trouble: why one of their kin cannot be used, the end of a sentence that begins with its name."""

    kind: Kind = ""
    trouble: str = ""


_FLUX = "is a ControlNet for FLUX or SD 3; ControlNets are read on Stable Diffusion and SDXL, on FLUX condition LoRAs and control LoRAs"
_UNION = "is a ControlNet of several kinds in one (union), which are not supported: give one for the kind of picture at hand"
_CLASSES = {
    "ControlNetModel": Found("controlnet"),
    "ControlNetUnionModel": Found(trouble=_UNION),
    "FluxControlNetModel": Found(trouble=_FLUX), "SD3ControlNetModel": Found(trouble=_FLUX),
    "ControlNetXSAdapter": Found(trouble="is a ControlNet-XS, which is not supported: give a plain ControlNet"),
    "UNetControlNetXSModel": Found(trouble="is a UNet with a ControlNet-XS in it, which is not supported: give a plain ControlNet"),
    "T2IAdapter": Found(trouble="is a T2I-Adapter, which is not supported: give a ControlNet"),
}
# Parts of tensors' names: a file is the first of these all of whose parts are in it.
_FILES = (
    (("lllite_",), Found(trouble="is a ControlNet-LLLite, which changes layers of SDXL in a way of its own and is not supported: give a ControlNet")),
    (("lora_controlnet",), Found(trouble="is a Control-LoRA by Stability AI: most of its weights are to be taken from SDXL's UNet, which is not "
                                         "supported: give a whole ControlNet")),
    (("controlnet_x_embedder",), Found(trouble=_FLUX)), (("controlnet_blocks.",), Found(trouble=_FLUX)),
    (("input_hint_block.", "double_blocks."), Found(trouble=_FLUX)), (("pos_embed_input.",), Found(trouble=_FLUX)),
    (("task_embedding", "controlnet_cond_embedding."), Found(trouble=_UNION)), (("control_add_embedding.",), Found(trouble=_UNION)),
    (("ip_adapter.",), Found(trouble="is an IP-Adapter, which is not supported")),
    (("image_proj.",), Found(trouble="is an IP-Adapter, which is not supported")),
    (("ctrl_xs", ), _CLASSES["ControlNetXSAdapter"]), (("base_to_ctrl.",), _CLASSES["ControlNetXSAdapter"]),
    (("adapter.body.",), _CLASSES["T2IAdapter"]), (("body.", ".in_conv."), _CLASSES["T2IAdapter"]), (("body.", ".block1."), _CLASSES["T2IAdapter"]),
    (("controlnet_cond_embedding.",), Found("controlnet")), (("input_hint_block.",), Found("controlnet")),
    (("img_in.lora_A.", ".norm.query_norm.scale"), Found("control-lora")),
)  # fmt: skip
_WIDENED = ("img_in.lora_A.weight", "x_embedder.lora_A.weight")  # of a control LoRA, with more inputs than a packed latent has
_LATENT = 64  # numbers in FLUX's packed latent


def recognise(path: Path) -> Found:
    """What a safetensors file or a folder is. Raises Refused for a file that is broken."""
    return _of_folder(path) if path.is_dir() else _of_file(path)


def usable(path: Path) -> Kind:
    """The kind, "" for none of these. Raises Refused for their kin that are not supported."""
    found = recognise(path)
    if found.trouble:
        raise Refused(f"{path.name} {found.trouble}")
    return found.kind


def of_names(names: Collection[str]) -> Found:
    """What a file with tensors of these names is."""
    for parts, found in _FILES:
        if all(any(part in name for name in names) for part in parts):
            return found
    return Found()


def _of_file(path: Path) -> Found:
    if path.suffix.lower() != ENDING:
        return Found()
    tensors = load_header(path).tensors
    found = of_names(tensors.keys())
    if found == Found():
        widths = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(_WIDENED) and tensor.ndim == 2]
        return Found("control-lora") if widths and widths[0] > _LATENT else found
    return found


def _of_folder(folder: Path) -> Found:
    try:
        config = untrusted.parse_file(folder / CONFIG)
    except untrusted.Unreadable:
        inner = sorted(child.name for child in folder.glob(f"controlnet*/{CONFIG}") for child in [child.parent])
        return Found(trouble=f"is not a ControlNet itself but holds one: give {inner[0]} in it") if inner else Found()
    name = config.get("_class_name") if isinstance(config, dict) else None
    return _CLASSES.get(name, Found()) if isinstance(name, str) else Found()
