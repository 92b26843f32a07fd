"""``python -m assets.recipe STAGE``: makes Pocket again from nothing but the npm art packages, resuming what was begun.

Stages: art (rendered from the packages), autoencoder, base, polish (of the decoder), export, judge, loras, previews (in the LoRAs'
headers, and their profiles), measure, and then flux, flux-loras, flux-previews and flux-measure for the second base, which has the
first one's autoencoder and is taught by it; or all of them in order. ``--budget`` is minutes of training for autoencoder, base,
polish, judge and flux together (their shares are below), compiling not counted, and a larger budget on a later call takes them
further; the LoRAs take their number of steps beside it. One code trains on a processor and on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionPipeline
from transformers import CLIPTokenizer

from retrieval.judge import Judge

from . import (
    art,
    autoencoder,
    base,
    confusion,
    export,
    flux,
    judge,
    loras,
    measure,
    presence,
    previews,
    testbed,
    tokenizer,
    unigram,
)
from .drawing import drawn_ahead
from .labelled import ALSO, START, Source
from .loop import Loop
from .places import HELD_PLACES, PLACES, variants
from .world import World, batch, strange_words

SHARES = {"autoencoder": 0.1, "base": 0.25, "polish": 0.1, "judge": 0.1, "flux": 0.45}  # of the budget
FIRST = ("art", "autoencoder", "base", "polish", "export", "judge", "loras", "previews", "measure")
SECOND = ("flux", "flux-loras", "flux-previews", "flux-measure")
STAGES = (*FIRST, *SECOND)
POCKET = Path(__file__).parents[1] / "pocket"
POLISHED = 10**8  # scene numbers from here on are what the decoder is polished on


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.recipe", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--packages", type=Path, default=Path("node_modules"), help="folder the npm art packages are installed in")
    parser.add_argument("--work", type=Path, default=Path(".work/recipe"), help="rendered art, checkpoints and measured figures")
    parser.add_argument("--out", type=Path, default=POCKET, help="where sd/, clip/, loras/ and testbed.json are written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes ahead; 0 draws them between the steps")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile what trains")
    parser.add_argument("--budget", type=float, default=480, help="minutes of training, all stages together")
    parser.add_argument("--objects", type=int, default=48)
    parser.add_argument("--places", type=int, default=len(PLACES))
    parser.add_argument("--variants", type=int, default=160, help="of each place, drawn ahead")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels, a multiple of 16")
    parser.add_argument("--vendors", default="noto,noto,noto,twemoji,fluent",
                        help=f"comma separated, of {', '.join(art.ART)}; one named twice is drawn twice as often")  # fmt: skip
    parser.add_argument("--blocks", default=",".join(map(str, base.BLOCKS)), help="widths of the denoiser's levels, multiples of 32")
    parser.add_argument("--fine", action=argparse.BooleanOptionalAction, default=True, help="attention at the finest level, too")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a batch of the base and of the second base")
    parser.add_argument("--begin", type=Path, help="a Pocket model folder: a new base begins with its tokenizer and text encoder")
    parser.add_argument("--loras", default=",".join(loras.TOLD), help=f"comma separated, of {', '.join(loras.TOLD)}")
    parser.add_argument("--lora-steps", type=int, default=0, help="0: as many as the plans say")
    parser.add_argument("--together", type=int, default=1, help="LoRAs that train as one batch; each takes its own rows")
    parser.add_argument("--measured", type=float, default=1.0, help="share of the usual renders and pictures that are measured on")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high")
    stages = STAGES if given.stage == "all" else (given.stage,)
    given.work.mkdir(parents=True, exist_ok=True)
    folder = given.work / "art"
    if "art" in stages and not folder.is_dir():
        art.make(given.packages, folder, given.size)
    if set(stages) == {"art"}:
        return
    grounds = variants([*PLACES, *HELD_PLACES], given.size, given.variants, workers=given.workers)
    _base(given, stages, folder, grounds)
    if "judge" in stages:
        _judge(given, Source(folder, given.size, objects=given.objects, places=given.places, grounds=grounds))
    if {"loras", "previews", "measure", *SECOND} & set(stages):
        world = _world(given, folder, grounds, also=ALSO)
        _first(given, stages, world)
        if set(SECOND) & set(stages):
            _second(given, stages, folder, world)


def _world(given: argparse.Namespace, folder: Path, grounds: Mapping[str, np.ndarray], also: Sequence[str] = ()) -> World:
    return World(folder, objects=given.objects, places=given.places, size=given.size, vendors=given.vendors.split(","), also=also,
                 variants=given.variants, strange=strange_words(folder), grounds=grounds)  # fmt: skip


def _base(given: argparse.Namespace, stages: Sequence[str], folder: Path, grounds: Mapping[str, np.ndarray]) -> None:
    """The stages up to the exported first base."""
    device, blocks = torch.device(given.device), tuple(int(b) for b in given.blocks.split(","))
    more = {"device": device, "compiled": given.compile}
    words = CLIPTokenizer.from_pretrained(given.begin / "tokenizer") if given.begin else tokenizer.build(tokenizer.corpus(folder))
    if {"autoencoder", "polish"} & set(stages):
        wide = autoencoder.wide_world(folder, given.size, given.vendors.split(","), grounds)
    if "autoencoder" in stages:
        autoencoder.train(wide, given.work, minutes=_minutes(given, "autoencoder"), workers=given.workers, **more)
    if {"base", "polish", "export"} & set(stages):
        vae = AutoencoderKL.from_pretrained(given.work / "vae")
    if "base" in stages:
        base.train(_world(given, folder, grounds), vae, words, given.work, minutes=_minutes(given, "base"), size=given.batch,
                   blocks=blocks, fine=given.fine, begin=given.begin, workers=given.workers, **more)  # fmt: skip
    if "polish" in stages:
        scenes = autoencoder.stock(wide, POLISHED + Loop.reached(given.work / "polish.pt"))
        with drawn_ahead([scenes], given.workers):
            pool = autoencoder.with_latents(vae.to(device), scenes, device)
            loop = autoencoder.polish(vae, pool, given.work, minutes=_minutes(given, "polish"), **more)
        print(f"decoder: {loop.seen} pictures more, {autoencoder.psnr(vae, autoencoder.some(wide, autoencoder.FRESH, 256)):.2f} dB on fresh scenes", flush=True)
        vae.save_pretrained(given.work / "vae")
    if "export" in stages:
        model, cost = base.trained(vae.cpu(), words, given.work, blocks, given.fine)
        export.export(model, vae, words, given.out / "sd")
        print("exported after", json.dumps(cost))


def _judge(given: argparse.Namespace, source: Source) -> None:
    words, folder = judge.vocabulary(source), given.out / "clip"
    scenes = judge.stock(source, words, START + Loop.reached(given.work / "judge.pt"))
    with drawn_ahead([scenes], given.workers):
        judge.train(source.named, words, scenes, folder, given.work, minutes=_minutes(given, "judge"), device=torch.device(given.device),
                    compiled=given.compile)  # fmt: skip
    _keep(given.work, "judge", presence.settle(folder, source, given.measured))
    confusion.settle(folder, source, each=max(2, round(200 * given.measured)))


def _first(given: argparse.Namespace, stages: Sequence[str], world: World) -> None:
    """The first base's LoRAs, and its figures."""
    if not {"loras", "previews", "measure"} & set(stages):
        return
    names, files = given.loras.split(","), given.out / "loras"
    pipe = StableDiffusionPipeline.from_pretrained(given.out / "sd").to(given.device)
    pipe.set_progress_bar_config(disable=True)
    if "loras" in stages:
        loras.make(pipe, world, names, files, given.work, plan=_plan(given, loras.PLAN), together=given.together, workers=given.workers)
        testbed.write(given.out / "testbed.json")
    if "previews" in stages:
        previews.make(pipe, names, files, Judge.open(str(given.out / "clip"), given.device))
        loras.profiled(pipe, names, files, given.out / "profiles")
    if "measure" in stages:
        _measured(given, "base", "loras", pipe, world, files, names)


def _second(given: argparse.Namespace, stages: Sequence[str], art: Path, world: World) -> None:
    """The stages of the small FLUX, on the exported first base."""
    folder, files = given.out / "flux", given.out / "flux-loras"
    if "flux" in stages:
        _flux(given, art, world, folder)
    if not set(SECOND[1:]) & set(stages):
        return
    names = [name for name in given.loras.split(",") if name in loras.FLUX]
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32).to(given.device)
    pipe.set_progress_bar_config(disable=True)
    if "flux-loras" in stages:
        loras.make(pipe, world, names, files, given.work, plan=_plan(given, loras.FLUX_PLAN), together=given.together,
                   workers=given.workers, base="pocket-flux")  # fmt: skip
        made = [name for name in loras.FLUX if (files / f"{loras.stem(name)}.safetensors").is_file()]
        testbed.write(given.out / "testbed-flux.json", made)
    if "flux-previews" in stages:
        previews.make(pipe, names, files, Judge.open(str(given.out / "clip"), given.device), base="pocket-flux")
        loras.profiled(pipe, names, files, given.out / "profiles", base="pocket-flux")
    if "flux-measure" in stages:
        _measured(given, "flux", "flux-loras", pipe, world, files, names)


def _flux(given: argparse.Namespace, art: Path, world: World, folder: Path) -> None:
    clip, t5 = CLIPTokenizer.from_pretrained(given.out / "sd/tokenizer"), unigram.build(tokenizer.corpus(art))
    vae = AutoencoderKL.from_pretrained(given.out / "sd/vae", dtype=torch.float32)
    pictures, _ = batch(world, flux.UNSEEN, 512)
    with torch.no_grad():
        flux.settle(vae, torch.cat([vae.encode(autoencoder.tensor(part)).latent_dist.mean for part in np.split(pictures, 8)]))
    scenes = base.stock(world, flux.reader(clip, t5), Loop.reached(given.work / "flux.pt"))
    with drawn_ahead([scenes], given.workers):
        model = flux.train(scenes, vae, clip, t5, given.out / "sd", given.work, minutes=_minutes(given, "flux"),
                           device=torch.device(given.device), settings=flux.Settings(given.batch, compiled=given.compile))  # fmt: skip
    export.export_flux(model.cpu(), vae.cpu(), clip, t5, folder)


def _measured(given: argparse.Namespace, first: str, second: str, pipe: object, world: World, files: Path, names: Sequence[str]) -> None:
    """Figures of a base and of its LoRAs."""
    seer, share = Judge.open(str(given.out / "clip"), given.device), partial(_share, given)
    _keep(given.work, first, measure.base_figures(pipe, seer, world, share(200)))
    _keep(given.work, second, measure.lora_figures(pipe, seer, world, files, names, share(40), share(200)))


def _share(given: argparse.Namespace, count: int) -> int:
    return max(2, round(count * given.measured))


def _minutes(given: argparse.Namespace, stage: str) -> float:
    return given.budget * SHARES[stage]


def _plan(given: argparse.Namespace, plan: loras.Plan) -> loras.Plan:
    return replace(plan, steps=given.lora_steps or plan.steps)


def _keep(work: Path, name: str, figures: dict) -> None:
    """Print the figures and write them beside the checkpoints."""
    text = json.dumps(figures, indent=2)
    (work / f"figures-{name}.json").write_text(text + "\n")
    print(name, text, flush=True)


if __name__ == "__main__":
    main()
