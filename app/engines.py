"""Where and how an engine runs, and opening one quietly: shared by the command line, the page and evaluations."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from app import settings
from app.terminal import err, printable
from composition import Refused
from composition.backbones.loading import catalog

if TYPE_CHECKING:
    from composition import Engine
    from retrieval.catalogue import Catalogue

SMALL = 30e6  # parameters under which a denoiser on a processor runs in one thread


@dataclass(frozen=True)
class EngineOptions:
    """Where and how the engine runs: the flags that are no part of a request."""

    device: str | None = None
    dtype: str | None = None
    offload: str = "auto"
    folders: tuple[Path, ...] = ()
    quantize: str | None = None
    denoiser: str | None = None
    vae: str | None = None


def folders(named: Sequence[Path], flag: str = "--lora-dir ") -> tuple[Path, ...]:
    """The user's LoRA folder, when it exists, and those named. Raises Refused for one that does not exist. flag: by which they were named."""
    for folder in named:
        if not folder.is_dir():
            raise Refused(f"{flag}{folder} is not a folder")
    own = settings.lora_folder()
    return tuple(dict.fromkeys([*([own] if own.is_dir() else []), *named]))


def prepare(model: str, *, judge: str = "pocket") -> None:
    """Prepare the environment before torch is imported: the libraries print only errors, use no network for a model
    and a judge that are on this machine, and their threads sleep while they wait (spinning, on cores that something else
    wants too, was measured forty times slower)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not os.environ.get("MEDLEY_DEBUG"):
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao, where it is installed
    here = ("/" not in model and model not in catalog.KNOWN) or Path(model).exists()  # a hub id has an owner
    if here and (judge == "pocket" or Path(judge).is_dir()):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def catalogue() -> "Catalogue":
    """The user's catalogue of LoRA files; it may not have been made yet."""
    from retrieval.catalogue import Catalogue

    return Catalogue(settings.home() / "catalogue.sqlite", lambda sentence: err.print(Text(printable(f"medley: {sentence}"), style="yellow")))


def open_engine(model: str, place: EngineOptions) -> "Engine":
    prepare(model)
    import torch

    from composition import Engine
    from composition.profiles.store import ProfileStore

    files = catalogue()
    engine = Engine.open(model, device=place.device, dtype=place.dtype, offload=place.offload, folders=place.folders,
                         quantize=place.quantize, denoiser=place.denoiser, profiles=ProfileStore(settings.home() / "profiles"),
                         vae=place.vae,
                         resolve=lambda source: files.find(source, model, place.folders))
    if engine.device.type == "cpu" and sum(part.numel() for part in engine.backbone.denoiser.parameters()) < SMALL:
        torch.set_num_threads(1)  # its layers are over before a second thread is awake: measured 1.6 times faster
    return engine
