"""From a LoRA file on the disk to factors by layer: Medley against diffusers' `load_lora_weights`, cold and warm.

    python -m tests.bench.loading [--large] [--megabytes N] [--rounds 3] [--threads N]

A random half-precision LoRA of every linear in SDXL's attention blocks (150 MB), or with --large in FLUX.1's blocks (1.2 GB), in diffusers'
layout, for models of true size whose weights are never touched. `medley` is what the first picture with a file pays: safe reading (three
hashes, every value looked at), layers found, factors by layer. `again` is a file that is held. `diffusers` is `load_lora_weights` into the
pipeline, PEFT layers made, and `unload_lora_weights` outside the clock; it hashes and checks nothing. Cold: the file's pages are dropped
from the system's cache first (POSIX_FADV_DONTNEED; where that does not exist, or a file system keeps pages all the same, cold is warm).
Both read every number once before the clock stops, since diffusers maps the file. Interleaved rounds, medians, in seconds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import nn

from composition.adapters.held import Held
from composition.backbones.loading import skeleton
from composition.loras import layers as layer_map

ARMS = ("medley, cold", "medley, warm", "medley, again", "diffusers, cold", "diffusers, warm")


def write(path: Path, component: str, module: nn.Module, megabytes: float) -> int:
    """A LoRA of about that size; returns its rank."""
    shapes = {name: layer_map.shape(layer)[:2] for name, layer in layer_map.layers(module).items() if "transformer_blocks" in name}
    rank = max(1, round(megabytes * 1e6 / 2 / sum(map(sum, shapes.values()))))
    tensors = {}
    for index, (name, (out, inputs)) in enumerate(shapes.items()):
        rng = torch.Generator().manual_seed(index)
        tensors[f"{component}.{name}.lora_A.weight"] = (torch.rand(rank, inputs, generator=rng) / 50).half()
        tensors[f"{component}.{name}.lora_B.weight"] = (torch.rand(out, rank, generator=rng) / 50).half()
    save_file(tensors, path)
    return rank


def drop(path: Path) -> None:
    """Ask the system to forget the file's pages."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pipeline(family: str, components: Mapping[str, nn.Module]) -> Any:
    """A stock pipeline around the denoiser alone, its memory reserved and never written."""
    name = "unet" if "unet" in components else "transformer"
    denoiser = components[name].half().to_empty(device="cpu").requires_grad_(False)
    kind: Any = StableDiffusionXLPipeline if family == "sdxl" else FluxPipeline
    parts = ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    pipe = kind(**dict.fromkeys(parts), **{name: denoiser})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="FLUX.1 and 1.2 GB, in place of SDXL and 150 MB")
    parser.add_argument("--megabytes", type=float, help="of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    family = "flux" if asked.large else "sdxl"
    components = skeleton.of_family(family)
    name = "transformer" if asked.large else "unet"
    own = {name: components[name]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        rank = write(path, name, own[name], asked.megabytes or (1200 if asked.large else 150))
        print(f"{family}, {path.stat().st_size / 1e6:.0f} MB, rank {rank}, {torch.get_num_threads()} threads of torch")
        pipe, held = pipeline(family, {name: skeleton.of_family(family)[name]}), Held(own, family, 4 * 2**30)

        def ours() -> None:
            held.files.clear()
            held.stamps.clear()
            assert held.read(path, "a", False).receipt.coverage == 1.0

        def again() -> None:
            held.read(path, "a", False)

        def theirs() -> None:
            pipe.load_lora_weights(folder, weight_name=path.name, adapter_name="a", low_cpu_mem_usage=True)
            for key, value in getattr(pipe, name).named_parameters():
                if ".lora_" in key:
                    value.sum()

        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for number in range(asked.rounds + 1):
            for arm in ARMS:
                (drop if arm.endswith("cold") else Path.read_bytes)(path)
                took = seconds(again if arm.endswith("again") else theirs if arm.startswith("diffusers") else ours)
                if arm.startswith("diffusers"):
                    pipe.unload_lora_weights()
                if number:
                    times[arm].append(took)
        base = statistics.median(times["diffusers, warm"])
        for arm, rounds in times.items():
            print(f"{arm:16}  {statistics.median(rounds):8.3f} s   fastest {min(rounds):8.3f}   {statistics.median(rounds) / base:6.2f} of diffusers, warm")


if __name__ == "__main__":
    main()
