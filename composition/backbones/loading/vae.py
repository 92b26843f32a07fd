"""Another autoencoder in place of a model's own: a folder, a .safetensors file or a hub id, as models are named.

Only safetensors are read. It has to be an AutoencoderKL of the shapes of the model's own, scaled as that is: families differ in both.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download
from torch import Tensor, dtype, nn

from composition import untrusted
from composition.backbones.loading import hub
from composition.loras.safetensors import load_safely
from composition.refusal import Refused

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
WAYS = "a diffusers folder of an AutoencoderKL, a .safetensors file, or a hub id such as stabilityai/sd-vae-ft-mse"
_CHECKPOINT = "first_stage_model."
_SCALING = {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None}  # what a configuration without them means


def replaced(pipeline: Any, source: str, number: dtype) -> str:
    """Put the autoencoder of `source` into an open pipeline, in this number type; the sha256 of its file. Raises Refused for what does not fit it."""
    weights, config = _located(source)
    own = pipeline.vae
    if not isinstance(own, AutoencoderKL):
        raise Refused(f"this model's autoencoder is a {type(own).__name__}, which no other takes the place of")
    if config is not None:
        _alike(source, config, own.config)
    file = load_safely(weights)
    vae = AutoencoderKL.from_config(own.config)
    assert isinstance(vae, AutoencoderKL)
    tensors = _tensors(source, file.tensors, own)
    expected = {name: tuple(weight.shape) for name, weight in vae.state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    wrong = [name for name, shape in expected.items() if name in tensors and tuple(tensors[name].shape) != shape]
    if wrong or missing:
        name = (wrong or missing)[0]
        what = f"its {name} is {_shape(tensors[name])}, the model's {_shape(own.state_dict()[name])}" if wrong else f"{len(missing)} tensors are missing, {name} first"
        raise Refused(f"{source} is not an autoencoder of this model's family: {what}")
    vae.load_state_dict({name: tensors[name] for name in expected})
    pipeline.vae = nn.Module.to(vae, number).eval().requires_grad_(False)
    return file.sha256


def _located(source: str) -> tuple[Path, Mapping[str, Any] | None]:
    """The file of weights, and the configuration where there is one beside it."""
    path = Path(source).expanduser()
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if weights is None or not (folder / "config.json").is_file():
            raise Refused(f"{source} is no folder of an autoencoder in safetensors: a VAE is {WAYS}")
        return weights, _config(folder / "config.json", source)
    if path.is_file() or path.suffix.lower() in (".safetensors", ".pt", ".ckpt", ".bin", ".pth"):
        return path, None  # `load_safely` says what is wrong with it
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise Refused(f"there is no VAE {source!r}: it is {WAYS}")
    try:
        with hub.plainly(source):
            config = Path(hf_hub_download(source, "config.json"))
            return Path(hf_hub_download(source, WEIGHTS[0])), _config(config, source)
    except Refused as error:
        raise Refused(f"VAE {error}") from None


def _config(file: Path, source: str) -> Mapping[str, Any]:
    try:
        config = untrusted.parse_file(file)
    except untrusted.Unreadable as error:
        raise Refused(f"the config.json of VAE {source} {error}") from None
    if not isinstance(config, dict) or config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise Refused(f"{source} is no AutoencoderKL: a VAE is {WAYS}")
    return config


def _alike(source: str, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse one whose latents are scaled otherwise: SD's and SDXL's, and FLUX's and SD3's, have the same shapes."""
    for name, usual in _SCALING.items():
        theirs, mine = config.get(name, usual), own.get(name, usual)
        if (theirs or None) != (mine or None):
            raise Refused(f"{source} is an autoencoder of another family: its {name} is {theirs}, this model's {mine}")


def _tensors(source: str, tensors: Mapping[str, Tensor], own: AutoencoderKL) -> Mapping[str, Tensor]:
    """The tensors by diffusers' names; of a file in the layout of the original code, and of a whole checkpoint, converted."""
    inner = {name.removeprefix(_CHECKPOINT): tensor for name, tensor in tensors.items() if name.startswith(_CHECKPOINT)} or dict(tensors)
    if not any(name.startswith(("encoder.down.", "decoder.up.")) for name in inner):
        return {_modern(name): tensor for name, tensor in inner.items()}
    with tempfile.TemporaryDirectory() as folder:
        own.save_config(str(Path(folder) / "vae"))
        try:
            model: Any = AutoencoderKL
            vae = model.from_single_file(inner, config=folder, subfolder="vae", local_files_only=True)
        except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise Refused(f"{source} is not an autoencoder of this model's family ({reason})") from None
    return {name: tensor for name, tensor in vae.state_dict().items() if not tensor.is_meta}


def _modern(name: str) -> str:
    """Diffusers' names of the middle attention as they are now: folders of its first years have query, key, value and proj_attn."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(mid_block\.attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
