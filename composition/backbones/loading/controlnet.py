"""A ControlNet for a UNet: a diffusers folder, or one .safetensors file in diffusers' or in the original layout, onto its device.

Its settings are compared with the UNet's before its weights are read, so that one made for another model is refused in words. The settings of a
single file are the UNet's own, as far as its names and shapes do not say otherwise; nothing is fetched.
"""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import ControlNetModel
from safetensors import SafetensorError, safe_open
from torch import nn

from composition import untrusted
from composition.backbones.loading import single_file
from composition.loras import controls, family
from composition.refusal import Refused

_SETTINGS = tuple(name for name in inspect.signature(ControlNetModel.__init__).parameters if name != "self")
_ORIGINAL = re.compile(r"(?:control_model\.)?input_hint_block\.(\d+)\.weight$")
_HINT = "controlnet_cond_embedding."
_NETS = "a ControlNet made for a model of other sizes"


def open(path: Path, backbone: Any) -> Any:
    """diffusers' ControlNetModel for a UNetBackbone, frozen, in the UNet's number type and where it computes. Raises Refused for what is not one that fits."""
    if controls.usable(path) != "controlnet":
        raise Refused(f"{path.name} is no ControlNet: one is a diffusers folder with a config.json that says so, or a .safetensors file")
    try:
        net = _of_folder(path, backbone) if path.is_dir() else _of_file(path, backbone)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError, SafetensorError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{path.name} cannot be opened as a ControlNet for this base ({' '.join(str(error).split())[:200]})") from None
    if absent := [name for name, weight in net.named_parameters() if weight.is_meta]:
        raise Refused(f"{path.name} is incomplete: {len(absent)} of its tensors are missing, {absent[0]} first; fetch it again")
    return nn.Module.to(net.eval().requires_grad_(False), backbone.device, backbone.dtype)


def _of_folder(folder: Path, backbone: Any) -> Any:
    _fits(folder.name, untrusted.parse_file(folder / controls.CONFIG), backbone)
    names = [file.name for file in folder.glob("*.safetensors")]
    if not names and any(file.suffix in (".bin", ".pt", ".pth") for file in folder.iterdir()):
        raise Refused(f"{folder.name} holds pickle files and no .safetensors: opening those can run code. Get a version in safetensors")
    half = bool(names) and all(".fp16." in name for name in names)
    return ControlNetModel.from_pretrained(folder, dtype=backbone.dtype, use_safetensors=True, local_files_only=True, variant="fp16" if half else None)


def _of_file(path: Path, backbone: Any) -> Any:
    shapes, _ = single_file.header(path)
    settings = _settings(shapes, backbone)
    _fits(path.name, settings, backbone, shapes)
    with safe_open(path, "pt") as file, TemporaryDirectory() as folder:
        tensors: Any = {name: file.get_tensor(name) for name in shapes}  # diffusers takes them too, though its types say a path
        Path(folder, controls.CONFIG).write_text(json.dumps({"_class_name": "ControlNetModel", **settings}))
        return ControlNetModel.from_single_file(tensors, config=folder, dtype=backbone.dtype, local_files_only=True)


def _settings(shapes: single_file.Header, backbone: Any) -> dict[str, Any]:
    """A file's settings: the UNet's, with the attention and the picture's reader that the file has."""
    own = backbone.denoiser.config
    settings = {name: own[name] for name in _SETTINGS if name in own}
    settings["conditioning_embedding_out_channels"], settings["conditioning_channels"] = _reader(shapes)
    if f"{_HINT}conv_in.weight" in shapes:  # diffusers' own layout says where it has attention, the original one has it where the UNet has
        blocks = range(len(own["block_out_channels"]))
        depths = [_depth(shapes, f"down_blocks.{block}.") for block in blocks]
        settings["down_block_types"] = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
        middle = _depth(shapes, "mid_block.")
        settings["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
        settings["transformer_layers_per_block"] = [*(max(depth, 1) for depth in depths[:-1]), max(depths[-1], middle, 1)]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _depth(shapes: single_file.Header, prefix: str) -> int:
    """Transformer blocks in each attention of a block, 0 without any."""
    block = re.compile(re.escape(prefix) + r"attentions\.0\.transformer_blocks\.(\d+)\.")
    return len({match[1] for name in shapes if (match := block.match(name))})


def _reader(shapes: single_file.Header) -> tuple[list[int], int]:
    """Channels of what reads the picture, from its sizes on: each halves the side of the one before; and those of the picture."""
    first = shapes.get(f"{_HINT}conv_in.weight")
    if first is not None:
        count = len([name for name in shapes if re.fullmatch(re.escape(_HINT) + r"blocks\.\d+\.weight", name)])
        return [first[0], *(shapes[f"{_HINT}blocks.{index}.weight"][0] for index in range(1, count, 2))], first[1]
    numbered = {int(match[1]): shape for name, shape in shapes.items() if (match := _ORIGINAL.match(name))}
    inner = sorted(numbered)[1:-1]
    return [numbered[0][0], *(numbered[place][0] for place in inner[1::2])], numbered[0][1]


def _fits(name: str, settings: Mapping[str, Any], backbone: Any, shapes: single_file.Header | None = None) -> None:
    """Raises Refused for settings of a ControlNet for another base. shapes: of a file, whose settings are the base's own."""
    own = backbone.denoiser.config
    theirs = {key: settings.get(key, default.default) for key, default in inspect.signature(ControlNetModel.__init__).parameters.items()}
    width = _text_width(shapes) if shapes else theirs["cross_attention_dim"]
    if width and own["cross_attention_dim"] and width != own["cross_attention_dim"]:
        words = family.WORDS.get(family.WIDTHS.get(width, ""), "another model")
        raise Refused(f"{name} is made for {words} (text width {width}); this base is {family.base(backbone.components, backbone.family)}")
    if (theirs["addition_embed_type"] or None) != own["addition_embed_type"]:
        raise Refused(f"{name} is made for {'SDXL' if theirs['addition_embed_type'] else 'SD'}; this base is {backbone.family.upper()}")
    for key, what in (("in_channels", "latents of {} channels"), ("block_out_channels", "blocks of widths {}"), ("layers_per_block", "{} layers in a block")):
        stated, wanted = (list(value) if isinstance(value, list | tuple) else value for value in (theirs[key], own[key]))
        if stated != wanted:
            raise Refused(f"{name} is {_NETS}: it has {what.format(stated)}, this base {wanted}")
    if theirs["conditioning_channels"] != 3:
        raise Refused(f"{name} reads a picture of {theirs['conditioning_channels']} channels, as for inpainting; those that read RGB are supported")
    if theirs["global_pool_conditions"]:
        raise Refused(f"{name} pools its picture to one place (as the shuffle ControlNet does), which is not supported")
    factor, ours = 2 ** (len(theirs["conditioning_embedding_out_channels"]) - 1), backbone.pipeline.vae_scale_factor
    if factor != ours:
        raise Refused(f"{name} is {_NETS}: it reads pictures at {factor} pixels for each place of the latents, this base has {ours}")


def _text_width(shapes: single_file.Header) -> int:
    return next((shape[1] for name, shape in sorted(shapes.items()) if name.endswith("attn2.to_k.weight")), 0)
