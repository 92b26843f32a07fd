"""The modules of a base without its weights, for what asks only for the names and shapes of layers: a fraction of a second, no memory.

Of a diffusers folder by its configurations, or of a family's public model: Stable Diffusion 1.5, 2.1 and XL by the configurations in
configs/, FLUX.1 by the defaults of diffusers' class. All parameters are on the device "meta".
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from composition import untrusted
from composition.backbones.loading.single_file import CONFIGS
from composition.refusal import Refused

PUBLIC = ("sd", "sd2", "sdxl", "flux")  # families with one public model whose layers their LoRAs name

_FOLDERS = {"sd": "sd15", "sd2": "sd2", "sdxl": "sdxl"}
_DENOISERS = {"unet": ("UNet2DConditionModel",), "transformer": ("FluxTransformer2DModel", "SD3Transformer2DModel")}
_TEXT = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


def of_family(family: str) -> dict[str, nn.Module]:
    """The denoiser and text encoders of a family's public model, by component. Raises Refused for a family without one (not in PUBLIC)."""
    if family in _FOLDERS:
        return of_folder(CONFIGS / _FOLDERS[family])
    if family != "flux":
        raise Refused(f"LoRAs of the family {family!r} fit no one public model: name the model that they are for")
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    return {"transformer": transformer, **of_folder(CONFIGS / "sd15", ("text_encoder",))}  # both read with CLIP-L


def of_folder(folder: Path, parts: tuple[str, ...] = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")) -> dict[str, nn.Module]:
    """Those of these parts that a diffusers folder has, by component. Raises Refused for a folder that cannot be read as one."""
    components = {}
    try:
        index = untrusted.parse_file(folder / "model_index.json")
        for part in parts:
            _, name = index.get(part) or (None, None)
            if name is not None:
                components[part] = _module(folder / part, part, name)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # untrusted.Unreadable is a ValueError
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{folder} cannot be read as a diffusers folder: its model_index.json or a config.json {reason}") from None
    return components


def _module(folder: Path, part: str, name: str) -> nn.Module:
    if name not in _DENOISERS.get(part, _TEXT):
        raise ValueError(f"names {name[:100]!r} as its {part}, which is not a class that is opened")
    settings: Any = untrusted.parse_file(folder / "config.json")
    with torch.device("meta"):
        if part in _DENOISERS:
            return getattr(diffusers, name).from_config(settings)
        model = getattr(transformers, name)
        return model(model.config_class.from_dict(settings))
