"""From what the user names to a stock diffusers pipeline: a bundled model, a folder, a checkpoint file, a hub id.

`find` says what a name means without the network, `load` opens it. Only safetensors are read, only stock classes are
built, local sources are opened without the network, and every part ends in the one dtype that was asked for.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from composition import bundled, untrusted
from composition.backbones.loading import catalog, hub, single_file
from composition.backbones.loading import quantize as quantization
from composition.bundled import BUNDLES
from composition.refusal import Refused

Family = Literal["sd", "sdxl", "sd3", "flux"]
FAMILIES: Mapping[str, Family] = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl",
                                   "StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
LORA_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")
OPENS = "Stable Diffusion 1.x to 3.5, SDXL and FLUX.1"
WAYS = "a bundled name, a diffusers folder, a .safetensors checkpoint, or a hub id such as org/name"


@dataclass(frozen=True)
class Location:
    """Where a model lies. source: as the user wrote it. path: of the folder or file, None for the hub."""

    kind: Literal["folder", "file", "hub"]
    source: str
    path: Path | None = None


def find(source: str) -> Location:
    """What `source` means, in this order: a bundled name, something on this disk, a hub id.

    Raises Refused, saying what to do, for a name that means nothing and for what cannot be opened.
    """
    if source in BUNDLES:
        return Location("folder", source, _bundled(source))
    if source in catalog.KNOWN:
        return Location("hub", catalog.repository(source))
    path = Path(source).expanduser()
    if path.suffix.lower() in PICKLES:
        raise Refused(f"{source} is a pickle file: opening it can run code that somebody put in it. Get the "
                      ".safetensors version, or convert it on a machine you can spare")
    if path.is_dir():
        _of_folder(path, source)
        return Location("folder", source, path)
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise Refused(f"{source} is not a .safetensors file: models are {WAYS}")
        single_file.kind(single_file.header(path)[0], path.name)
        return Location("file", source, path)
    if re.match(r"https?://", source):
        hub = re.match(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)/?$", source)
        raise Refused(f"{source} is a web address: " + (f"give {hub[1]}" if hub else "download the file and name it"))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and path.suffix.lower() != ".safetensors":
        return Location("hub", source)
    near = get_close_matches(source.lower(), [*BUNDLES, *catalog.KNOWN], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise Refused(f"there is no model {source!r}: {hint}A model is {WAYS}; bundled: {', '.join(BUNDLES)}; on the hub by a short name: "
                  f"{', '.join(catalog.KNOWN)}")


def family(thing: "Location | DiffusionPipeline") -> Family:
    """Which family a location (of the hub its small index is fetched) or an open pipeline is of.

    Raises Refused for one that this version does not compose.
    """
    if isinstance(thing, Location):
        if thing.kind == "file":
            assert thing.path is not None
            return "sdxl" if single_file.kind(single_file.header(thing.path)[0], thing.path.name) == "sdxl" else "sd"
        return _of_folder(thing.path or hub.index(thing.source).parent, thing.source)
    for cls, name in FAMILIES.items():
        if isinstance(thing, getattr(diffusers, cls)):
            return name
    raise Refused(_unsupported("this pipeline", type(thing).__name__))


def load(
    location: Location, dtype: torch.dtype, *, quantize: str | None = None, denoiser: Path | None = None
) -> DiffusionPipeline:
    """The model as a stock pipeline on the CPU: frozen, in `dtype` throughout, without safety checker or bars.

    quantize: a kind of `quantize.KINDS`. denoiser: a file of the denoiser's weights alone, in place of the model's own.
    Raises Refused when it cannot be had (network, token, missing or damaged weights) or is not a family known here.
    """
    with _quietly():
        if location.kind == "file":
            assert location.path is not None
            if quantize or denoiser:
                raise Refused(f"{location.source} is one file; quantizing, or another denoiser, needs a diffusers folder or a hub id")
            pipeline = single_file.load(location.path, dtype)
        else:
            if location.path is None:
                _of_folder(hub.index(location.source).parent, location.source)
            folder = location.path or hub.download(location.source)
            pipeline = _from_folder(folder, location.source, dtype, quantize, denoiser)
    family(pipeline)
    settings: Any = (getattr(pipeline, "unet", None) or pipeline.transformer).config
    writes = settings.out_channels or settings.in_channels
    if settings.in_channels != writes:
        raise Refused(f"{location.source} is an inpainting or editing model ({settings.in_channels} input channels "
                      f"in place of {writes}): give the plain text-to-image version")
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            if not quantization.quantized(part):
                nn.Module.to(part, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _bundled(name: str) -> Path:
    folder = bundled.path(BUNDLES[name].model)
    if not (folder / "model_index.json").is_file():
        raise Refused(f"the bundled model {name!r} is not in this installation: install Medley again, from its wheel "
                      "or from a clone with its assets folder")
    return folder


def _of_folder(folder: Path, source: str) -> Family:
    """The family by model_index.json alone, so that the wrong model is refused before its weights are read."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise Refused(f"{source} {_instead(folder)}")
    try:
        index = untrusted.parse_file(index_file)
        cls, entries = index["_class_name"], [value for value in index.values() if isinstance(value, list)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"{source} has a damaged model_index.json: fetch the model again") from None
    libraries = {entry[0] for entry in entries if entry and isinstance(entry[0], str)}
    if not isinstance(cls, str) or libraries - {"diffusers", "transformers", "stable_diffusion"}:
        raise Refused(f"{source} wants to run code of its own, which is not done here: it opens {OPENS}")
    if cls not in FAMILIES:
        raise Refused(_unsupported(source, cls))
    return FAMILIES[cls]


def _unsupported(source: str, cls: str) -> str:
    if "Inpaint" in cls or "Img2Img" in cls or "Pix2Pix" in cls or "Upscale" in cls or "Refiner" in cls:
        return f"{source} is a {cls}, which starts from a picture: give a text-to-image model"
    return f"{source} is a {cls}, not supported yet by this version: it opens {OPENS}"


def _instead(folder: Path) -> str:
    """What a folder without model_index.json is, in the words of a refusal."""
    names = sorted(entry.name for entry in folder.iterdir())
    inner = [name for name in names if (folder / name / "model_index.json").is_file()]
    weights = [name for name in names if name.lower().endswith(".safetensors")]
    if not names:
        return f"is an empty folder: a model is {WAYS}"
    if any(name in names for name in LORA_FILES):
        return "is the folder of a LoRA, not of a model: give it as a LoRA"
    if "modular_model_index.json" in names:
        return "is a modular pipeline, not supported yet by this version: give the model's plain diffusers folder"
    if inner:
        return f"is not a model itself but holds some: give {', '.join(inner[:5])} in it"
    if "config.json" in names:
        return "is one component of a model: give the folder above it, that holds model_index.json"
    if weights:
        return f"is a folder of files, not a diffusers model: name one of them, such as {weights[0]}"
    return f"is not a model: it holds no model_index.json. A model is {WAYS}"


def _from_folder(
    folder: Path, source: str, dtype: torch.dtype, quantize: str | None = None, denoiser: Path | None = None
) -> DiffusionPipeline:
    kind = _of_folder(folder, source)
    cls = next(getattr(diffusers, name) for name, value in FAMILIES.items() if value == kind)
    extra: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    extra |= {"sd": {"requires_safety_checker": False, "safety_checker": None}, "sdxl": {"add_watermarker": False}}.get(kind, {})
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    index = untrusted.parse_file(folder / "model_index.json")
    if denoiser is not None:
        if "transformer" not in index:
            raise Refused(f"{source} has no transformer to put {denoiser.name} in place of: a file of its own is for FLUX and SD3")
        extra["transformer"] = quantization.denoiser(denoiser, getattr(diffusers, index["transformer"][1]), folder, dtype)
    if quantize is not None:
        parts = {name: index[name][0] for name in quantization.LARGE if name in index and name not in extra
                 and (index[name][0] == "diffusers" or index[name][1] == "T5EncoderModel")}
        extra["quantization_config"] = quantization.config(quantize, parts, dtype)
    try:
        pipeline = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, variant=hub.variant(names), **extra
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if "safetensors" in str(error) and any(name.endswith(PICKLES) for name in names):
            raise Refused(f"{source} holds pickle files (.bin) and no .safetensors: opening those can run code. Get a "
                          "version in safetensors") from None
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{source} cannot be opened ({reason}): fetch the model again") from None
    _complete(pipeline, folder, source)
    return pipeline


def _complete(pipeline: DiffusionPipeline, folder: Path, source: str) -> None:
    """Refuse a model some of whose weights are missing: diffusers leaves them empty, transformers makes them up."""
    for component, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        absent = [name for name, weight in part.named_parameters() if weight.is_meta]
        if component.startswith("text_encoder"):
            stored: set[str] = set()
            for file in (folder / component).glob("*.safetensors"):
                with safe_open(file, "pt") as tensors:
                    stored |= {name.removeprefix("text_model.") for name in list(tensors.keys())}
            names: dict[int, list[str]] = {}  # of each weight: T5's embedding has two, and a file has either
            for name, weight in part.named_parameters(remove_duplicate=False):
                names.setdefault(id(weight), []).append(name)
            absent = [same[0] for same in names.values() if not any(name.removeprefix("text_model.") in stored for name in same)]
        if absent:
            raise Refused(f"{source} is incomplete: {len(absent)} tensors of its {component} are missing, {absent[0]} "
                          "first; fetch the model again")


@contextmanager
def _quietly() -> Iterator[None]:
    """No loading bars, and no warnings (of what they warn that matters, `load` refuses); both given back after."""
    both = (diffusers_logging, transformers_logging)
    logs = [(log, log.is_progress_bar_enabled(), log.get_verbosity()) for log in both]
    for log, _, _ in logs:
        log.disable_progress_bar()
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, bar, verbosity in logs:
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()
