"""``python -m assets.recipe STAGE``: makes Pocket again from nothing but the npm art packages, resuming what was begun.

Stages: autoencoder, base, polish (of the decoder), export, loras, measure, or all of them in order. ``--budget`` is minutes for the three
trained stages together; a larger budget on a later call takes them further.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from . import autoencoder, base, export, loras, measure, tokenizer
from .world import ART, World

STAGES = ("autoencoder", "base", "polish", "export", "loras", "measure")
POCKET = Path(__file__).parents[1] / "pocket"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.recipe", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--art", type=Path, default=Path("node_modules"), help="folder the art packages are installed in")
    parser.add_argument("--work", type=Path, default=Path(".work/recipe"), help="checkpoints and measured figures")
    parser.add_argument("--out", type=Path, default=POCKET, help="where sd/ and loras/ are written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=60, help="minutes of training, autoencoder, base and decoder together")
    parser.add_argument("--objects", type=int, default=16)
    parser.add_argument("--places", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels, a multiple of 16")
    parser.add_argument("--vendors", default="noto", help=f"comma separated, of {', '.join(ART)}")
    parser.add_argument("--blocks", default="128,128", help="widths of the denoiser's levels, multiples of 32")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a batch of the base")
    parser.add_argument("--loras", default=",".join(loras.FIRST), help=f"comma separated, of {', '.join(loras.TOLD)}")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    stages = STAGES if given.stage == "all" else (given.stage,)
    names = given.loras.split(",")
    blocks = tuple(int(b) for b in given.blocks.split(","))
    device, vendors = torch.device(given.device), given.vendors.split(",")
    given.work.mkdir(parents=True, exist_ok=True)
    also = [*loras.HELD_OBJECTS, *loras.HELD_PLACES] if {"loras", "measure"} & set(stages) else []
    world = World(given.art, objects=given.objects, places=given.places, size=given.size, vendors=vendors, also=also)
    words = tokenizer.build(tokenizer.corpus(given.art))
    if {"autoencoder", "polish"} & set(stages):
        wide = autoencoder.wide_world(given.art, given.size, vendors)
    if "autoencoder" in stages:
        autoencoder.train(world, wide, given.work, minutes=given.budget * 0.3, device=device)
    if {"base", "polish", "export"} & set(stages):
        vae = AutoencoderKL.from_pretrained(given.work / "vae")
    if "base" in stages:
        base.train(world, vae, words, given.work, minutes=given.budget * 0.6, device=device, size=given.batch, blocks=blocks)
    if "polish" in stages:
        autoencoder.polish(vae, world, wide, given.work, minutes=given.budget * 0.1, device=device)
    if "export" in stages:
        model, cost = base.trained(vae, words, given.work, blocks)
        export.export(model, vae, words, given.out / "sd")
        print("exported after", json.dumps(cost))
    if {"loras", "measure"} & set(stages):
        pipe = StableDiffusionPipeline.from_pretrained(given.out / "sd").to(device)
        pipe.set_progress_bar_config(disable=True)
    if "loras" in stages:
        loras.make(pipe, world, names, given.out / "loras", given.work)
    if "measure" in stages:
        figures = measure.everything(pipe, world, given.out / "loras", given.work)
        (given.work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
