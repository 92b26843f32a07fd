"""What each task does on the GPU: it prepares, waits for its turn, trains, and packs its files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from . import autoencoder, export, flux, judge, loras, parcel
from .drawing import Shared, Stock
from .labelled import Named
from .tasks import Turn


@dataclass(frozen=True)
class Stages:
    """What every task receives. fresh: pictures the decoder is measured on; unseen: those the second base's shift and scale come from."""

    base: Path
    out: Path
    work: Path
    device: torch.device
    sizes: Any
    named: Named
    words: PreTrainedTokenizerFast
    clip: CLIPTokenizer
    t5: T5Tokenizer
    fresh: Shared
    unseen: Shared
    pictures: Stock
    scenes: Stock
    labelled: Stock

    def polish(self, turn: Turn, compiled: bool) -> None:
        """The decoder; the rest of the autoencoder stays as it is in the base's folder."""
        begin()
        vae = AutoencoderKL.from_pretrained(self.base / "vae", dtype=torch.float32).to(self.device, memory_format=torch.channels_last)
        report(f"{autoencoder.psnr(vae, self.fresh.array):.2f} dB before")
        pool = autoencoder.with_latents(vae, self.pictures, self.device, self.sizes.wide)
        loop = autoencoder.polish(vae, pool, self.work, minutes=turn.minutes, device=self.device, size=self.sizes.polish,
                                  compiled=compiled)  # fmt: skip
        turn.trained()
        file = self.work / "decoder.safetensors"
        save_file({k: v.half().contiguous() for k, v in vae.state_dict().items() if k.startswith("decoder.")}, file)
        packed(self.work, [file], self.out, "decoder")
        report(f"{loop.step} steps, {loop.seen} pictures from {pool.count}, {autoencoder.psnr(vae, self.fresh.array):.2f} dB")

    def judge(self, turn: Turn, compiled: bool) -> None:
        """Its weights and tokenizer; thresholds and figures are made later, on any processor."""
        begin()
        folder = self.work / "clip"
        loop = judge.train(self.named, self.words, self.labelled, folder, self.work, minutes=turn.minutes, device=self.device,
                           size=self.sizes.judge, names_per_batch=10**6, limit=self.sizes.labelled, compiled=compiled, ended=turn.trained)  # fmt: skip
        packed(self.work, folder.iterdir(), self.out, "clip")
        report(f"{loop.step} steps, {loop.seen} pictures")

    def flux(self, turn: Turn, settings: flux.Settings) -> None:
        """The second base; its autoencoder is the first's, so only the configuration of that is packed."""
        begin()
        vae = AutoencoderKL.from_pretrained(self.base / "vae", dtype=torch.float32).to(self.device)
        with torch.no_grad():
            parts = torch.as_tensor(self.unseen.array).to(self.device).split(64)
            flux.settle(vae, torch.cat([vae.encode(autoencoder.tensor(part)).latent_dist.mean for part in parts]))
        model = flux.train(self.scenes, vae, self.clip, self.t5, self.base, self.work, minutes=turn.minutes, device=self.device,
                           settings=settings, limit=self.sizes.scenes)  # fmt: skip
        turn.trained()
        folder = self.work / "flux"
        export.export_flux(model.cpu(), vae.cpu(), self.clip, self.t5, folder)
        whole = [path for path in folder.rglob("*") if path.is_file()]
        packed(self.work, [path for path in whole if path.parent.name != "vae" or path.suffix == ".json"], self.out, "flux")


@dataclass(frozen=True)
class LoraStage:
    """One group of LoRAs and its scenes. second: on the second base, which is in the work folder by then."""

    base: Path
    out: Path
    work: Path
    device: torch.device
    group: loras.Group
    scenes: Mapping[str, tuple[Shared, list[str]]]
    second: bool = False
    trial: int = loras.TRIAL

    def run(self, turn: Turn, _: object) -> None:
        begin()
        pipe = FluxPipeline.from_pretrained(self.work / "flux", dtype=torch.float32) if self.second else \
            StableDiffusionPipeline.from_pretrained(self.base)  # fmt: skip
        files = self.work / ("flux-loras" if self.second else "loras")
        loras.learn(pipe.to(self.device), self.group, {name: (held.array, prompts) for name, (held, prompts) in self.scenes.items()},
                    files, self.work, minutes=turn.minutes, trial=self.trial, base="pocket-flux" if self.second else "pocket", report=report)  # fmt: skip
        turn.trained()
        packed(self.work, [files / f"{loras.stem(name)}.safetensors" for name in self.group.names], self.out,
               files.name if self.second else f"loras-{self.group.plan.steps}")  # fmt: skip


def begin() -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def packed(work: Path, paths: Iterable[Path], out: Path, name: str) -> None:
    parts = parcel.pack(work, paths, out, name)
    report(f"packed {', '.join(f'{part.name} ({part.stat().st_size / 2**20:.1f} MiB)' for part in parts)}")
    if torch.cuda.is_available():
        report(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def report(text: str) -> None:
    print(time.strftime("%X"), text, flush=True)
