"""What each task does on the GPU: it makes all ready, waits for its turn, trains, and packs its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from . import autoencoder, export, flux, judge, loras, parcel
from .drawing import Stock
from .labelled import Source
from .tasks import Turn
from .world import World, batch


@dataclass(frozen=True)
class Stages:
    """What all tasks share; every process has it from before it was forked."""

    base: Path
    out: Path
    work: Path
    device: torch.device
    sizes: Any
    world: World
    wide: World
    source: Source
    words: PreTrainedTokenizerFast
    clip: CLIPTokenizer
    t5: T5Tokenizer
    taught: Mapping[str, tuple[np.ndarray, list[str]]]
    pictures: Stock
    scenes: Stock
    labelled: Stock

    def lora_task(self, group: loras.Group, folder: str, base: str) -> Callable[[Turn, object], None]:
        """Learn one group of LoRAs on the first base ("sd") or the second ("flux")."""

        def run(turn: Turn, _: object) -> None:
            self._begin()
            if folder == "sd":
                pipe, files, name = StableDiffusionPipeline.from_pretrained(self.base), self.work / "loras", f"loras-{group.plan.steps}"
            else:
                pipe, files, name = FluxPipeline.from_pretrained(self.work / "flux", dtype=torch.float32), self.work / "flux-loras", folder
                name = "flux-loras"
            pipe.set_progress_bar_config(disable=True)
            loras.learn(pipe.to(self.device), group, self.taught, files, self.work, minutes=turn.minutes, base=base, report=_said)
            turn.trained()
            self._pack([files / f"{loras.stem(one)}.safetensors" for one in group.names], name)

        return run

    def polish(self, turn: Turn, compiled: bool) -> None:
        """The decoder; the autoencoder's folder is the base's."""
        self._begin()
        vae = AutoencoderKL.from_pretrained(self.base / "vae", dtype=torch.float32).to(self.device, memory_format=torch.channels_last)
        _said(f"{autoencoder.psnr(vae, self.wide):.2f} dB before")
        pool = autoencoder.with_latents(vae, self.pictures, self.device, self.sizes.wide)
        loop = autoencoder.polish(vae, pool, self.work, minutes=turn.minutes, device=self.device, size=self.sizes.polish,
                                  compiled=compiled)  # fmt: skip
        turn.trained()
        _said(f"{loop.step} steps, {loop.seen} pictures from {pool.count}, {autoencoder.psnr(vae, self.wide):.2f} dB")
        file = self.work / "decoder.safetensors"
        save_file({k: v.half().contiguous() for k, v in vae.state_dict().items() if k.startswith("decoder.")}, file)
        self._pack([file], "decoder")

    def judge(self, turn: Turn, compiled: bool) -> None:
        """Its weights and tokenizer; thresholds and figures are made later, on any processor."""
        self._begin()
        folder = self.work / "clip"
        loop = judge.train(self.source, self.words, self.labelled, folder, self.work, minutes=turn.minutes, device=self.device,
                           size=self.sizes.judge, asked=10**6, limit=self.sizes.labelled, compiled=compiled, ended=turn.trained)  # fmt: skip
        _said(f"{loop.step} steps, {loop.seen} pictures")
        self._pack(folder.iterdir(), "clip")

    def flux(self, turn: Turn, settings: flux.Settings) -> None:
        """The second base; its autoencoder is the first's, so only the configuration of that is packed."""
        self._begin()
        vae = AutoencoderKL.from_pretrained(self.base / "vae", dtype=torch.float32).to(self.device)
        pictures, _ = batch(self.world, flux.UNSEEN, min(512, self.sizes.scenes))
        with torch.no_grad():
            parts = torch.as_tensor(pictures).to(self.device).split(64)
            flux.settle(vae, torch.cat([vae.encode(autoencoder.tensor(part)).latent_dist.mean for part in parts]))
        model = flux.train(self.scenes, vae, self.clip, self.t5, self.base, self.work, minutes=turn.minutes, device=self.device,
                           settings=settings, limit=self.sizes.scenes)  # fmt: skip
        turn.trained()
        folder = self.work / "flux"
        export.export_flux(model.cpu(), vae.cpu(), self.clip, self.t5, folder)
        whole = [path for path in folder.rglob("*") if path.is_file()]
        self._pack([path for path in whole if path.parent.name != "vae" or path.suffix == ".json"], "flux")

    def _begin(self) -> None:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True

    def _pack(self, paths: Any, name: str) -> None:
        parts = parcel.pack(self.work, paths, self.out, name)
        _said(f"packed {', '.join(f'{part.name} ({part.stat().st_size / 2**20:.1f} MiB)' for part in parts)}")
        if self.device.type == "cuda":
            _said(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def _said(text: str) -> None:
    print(time.strftime("%X"), text, flush=True)
