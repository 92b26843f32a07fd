"""``python -m assets.recipe STAGE``: makes Pocket again from nothing but the npm art packages, resuming what was begun.

Stages: autoencoder, base, polish (of the decoder), export, judge, loras, measure, and then flux, flux-loras and flux-measure for the
second base, which has the first one's autoencoder and is taught by it; or all of them in order. ``--budget`` is minutes of
training for autoencoder, base, polish, judge and flux together (their shares are below), and a larger budget on a later call takes
them further; the LoRAs take their number of steps beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionPipeline
from transformers import CLIPTokenizer

from retrieval.judge import Judge

from . import autoencoder, base, confusion, export, flux, judge, loras, measure, presence, testbed, tokenizer, unigram
from .places import PLACES
from .world import ART, World, batch, strange_words

SHARES = {"autoencoder": 0.1, "base": 0.25, "polish": 0.02, "judge": 0.08, "flux": 0.55}  # of the budget
STAGES = ("autoencoder", "base", "polish", "export", "judge", "loras", "measure", "flux", "flux-loras", "flux-measure")
POCKET = Path(__file__).parents[1] / "pocket"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.recipe", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--art", type=Path, default=Path("node_modules"), help="folder the art packages are installed in")
    parser.add_argument("--work", type=Path, default=Path(".work/recipe"), help="checkpoints and measured figures")
    parser.add_argument("--out", type=Path, default=POCKET, help="where sd/, clip/, loras/ and testbed.json are written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=480, help="minutes of training, all stages together")
    parser.add_argument("--objects", type=int, default=48)
    parser.add_argument("--places", type=int, default=len(PLACES))
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels, a multiple of 16")
    parser.add_argument("--vendors", default="noto,noto,noto,twemoji,fluent",
                        help=f"comma separated, of {', '.join(ART)}; one named twice is drawn twice as often")  # fmt: skip
    parser.add_argument("--blocks", default="64,160", help="widths of the denoiser's levels, multiples of 32")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a batch of the base")
    parser.add_argument("--begin", type=Path, help="a Pocket model folder: a new base begins with its tokenizer and text encoder")
    parser.add_argument("--loras", default=",".join(loras.TOLD), help=f"comma separated, of {', '.join(loras.TOLD)}")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    stages = STAGES if given.stage == "all" else (given.stage,)
    minutes = {stage: given.budget * share for stage, share in SHARES.items()}
    blocks = tuple(int(b) for b in given.blocks.split(","))
    device, vendors = torch.device(given.device), given.vendors.split(",")
    given.work.mkdir(parents=True, exist_ok=True)
    words = CLIPTokenizer.from_pretrained(given.begin / "tokenizer") if given.begin else tokenizer.build(tokenizer.corpus(given.art))
    if {"autoencoder", "polish"} & set(stages):
        wide = autoencoder.wide_world(given.art, given.size, vendors)
    if "autoencoder" in stages:
        autoencoder.train(wide, given.work, minutes=minutes["autoencoder"], device=device)
    if {"base", "polish", "export"} & set(stages):
        vae = AutoencoderKL.from_pretrained(given.work / "vae")
    second = {"flux", "flux-loras", "flux-measure"} & set(stages)
    if {"base", "loras", "measure", *second} & set(stages):
        also = judge.ALSO if {"loras", "measure", "flux-loras", "flux-measure"} & set(stages) else ()
        world = World(given.art, objects=given.objects, places=given.places, size=given.size, vendors=vendors, also=also,
                      strange=strange_words(given.art))  # fmt: skip
    if "base" in stages:
        base.train(world, vae, words, given.work, minutes=minutes["base"], device=device, size=given.batch, blocks=blocks,
                   begin=given.begin)  # fmt: skip
    if "polish" in stages:
        autoencoder.polish(vae, wide, given.work, minutes=minutes["polish"], device=device)
    if "export" in stages:
        model, cost = base.trained(vae, words, given.work, blocks)
        export.export(model, vae, words, given.out / "sd")
        print("exported after", json.dumps(cost))
    if "judge" in stages:
        judge.train(given.art, given.out / "clip", given.work, minutes=minutes["judge"], device=device)
        _keep(given.work, "judge", presence.settle(given.out / "clip", given.art))
        confusion.settle(given.out / "clip", given.art)
    if {"loras", "measure"} & set(stages):
        pipe = StableDiffusionPipeline.from_pretrained(given.out / "sd").to(device)
        pipe.set_progress_bar_config(disable=True)
        seer, names = Judge.open(str(given.out / "clip"), given.device), given.loras.split(",")
    if "loras" in stages:
        loras.make(pipe, world, names, given.out / "loras", given.work, judge=seer)
        testbed.write(given.out / "testbed.json")
        loras.profiled(pipe, names, given.out / "loras", given.out / "profiles")
    if "measure" in stages:
        _keep(given.work, "base", measure.base_figures(pipe, seer, world))
        _keep(given.work, "loras", measure.lora_figures(pipe, seer, world, given.out / "loras", names))
    if second:
        _second(given, stages, world, minutes["flux"])


def _second(given: argparse.Namespace, stages: Sequence[str], world: World, minutes: float) -> None:
    """The stages of the small FLUX, on the exported first base."""
    device, folder, files = torch.device(given.device), given.out / "flux", given.out / "flux-loras"
    if "flux" in stages:
        clip = CLIPTokenizer.from_pretrained(given.out / "sd/tokenizer")
        t5 = unigram.build(tokenizer.corpus(given.art))
        vae = AutoencoderKL.from_pretrained(given.out / "sd/vae", dtype=torch.float32)
        pictures, _ = batch(world, flux.UNSEEN, 512)
        with torch.no_grad():
            flux.settle(vae, vae.encode(autoencoder.tensor(pictures)).latent_dist.mean)
        model = flux.train(world, vae, clip, t5, given.out / "sd", given.work, minutes=minutes, device=device, size=given.batch)
        export.export_flux(model.cpu(), vae.cpu(), clip, t5, folder)
    if {"flux-loras", "flux-measure"} & set(stages):
        pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
        seer, names = Judge.open(str(given.out / "clip"), given.device), [name for name in given.loras.split(",") if name in loras.FLUX]
        if "flux-loras" in stages:
            loras.make(pipe, world, names, files, given.work, plan=loras.FLUX_PLAN, judge=seer, base="pocket-flux")
            made = [name for name in loras.FLUX if (files / f"{loras.stem(name)}.safetensors").is_file()]
            testbed.write(given.out / "testbed-flux.json", made)
            loras.profiled(pipe, names, files, given.out / "profiles", base="pocket-flux")
        if "flux-measure" in stages:
            _keep(given.work, "flux", measure.base_figures(pipe, seer, world))
            _keep(given.work, "flux-loras", measure.lora_figures(pipe, seer, world, files, names))


def _keep(work: Path, name: str, figures: dict) -> None:
    """Print the figures and write them beside the checkpoints."""
    text = json.dumps(figures, indent=2)
    (work / f"figures-{name}.json").write_text(text + "\n")
    print(name, text, flush=True)


if __name__ == "__main__":
    main()
