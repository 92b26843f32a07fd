"""``python -m assets.recipe STAGE``: makes Pocket again from the npm art packages alone, resuming unfinished stages.

Stages: art (rendered from the packages), autoencoder, base, polish (of the decoder), export, judge, loras, previews (in the LoRAs'
headers, and their profiles), measure, controlnet and controlnet-measure, and then flux, flux-loras, flux-previews and flux-measure for the
second base, which has the first one's autoencoder and is taught by it, and flux-conditions and flux-conditions-measure for its condition
LoRAs; or all of them in order. By themselves stand pool, hundreds of small LoRAs for the search (of either base: --of), pool-looks, pictures made with each, encoder, the
weight encoder of the pool, and gates, AutoLoRA's, learned from the pool. ``--budget`` is minutes of training for autoencoder, base, polish, judge, controlnet and flux together (their
shares are below), compiling not counted, and a larger budget on a later call takes them further; the LoRAs' number of steps is not part of
it, and pool has all of it, in minutes of processor time. The same code trains on a processor and on a GPU.
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
from transformers import CLIPTokenizer, T5Tokenizer

from composition import Engine, backbones
from retrieval import training
from retrieval.judge import Judge
from retrieval.linear import LinearEncoder

from . import (
    art,
    autoencoder,
    base,
    conditions,
    confusion,
    controlled,
    controlnet,
    encoder,
    export,
    flux,
    gates,
    judge,
    loras,
    measure,
    pool,
    presence,
    previews,
    testbed,
    tokenizer,
    unigram,
)
from .drawing import drawn_ahead
from .labelled import ALSO, START, Source
from .loop import Loop, joined
from .objects import OBJECTS
from .places import HELD_PLACES, PLACES, variants
from .shorten import shorten
from .world import World, batch, strange_words

SHARES = {"autoencoder": 0.1, "base": 0.25, "polish": 0.1, "judge": 0.1, "controlnet": 0.05, "flux": 0.4}  # of the budget
FIRST = ("art", "autoencoder", "base", "polish", "export", "judge", "loras", "previews", "measure", "controlnet", "controlnet-measure")
SECOND = ("flux", "flux-loras", "flux-previews", "flux-measure")
THIRD = ("flux-conditions", "flux-conditions-measure")
STAGES = (*FIRST, *SECOND, *THIRD)
POOL = ("pool", "pool-measure", "pool-looks", "encoder", "gates")
POCKET = Path(__file__).parents[1] / "pocket128"
POLISHED = 10**8  # scene numbers from here on are what the decoder is polished on


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.recipe", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, *POOL, "all"))
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
    parser.add_argument("--begin-flux", type=Path, help="a Pocket-FLUX folder of the same shape: a new second base begins with its weights and T5's tokenizer")
    parser.add_argument("--flux-peak", type=float, default=1.5e-3, help="highest learning rate of the second base")
    parser.add_argument("--loras", default=",".join(loras.CARDS), help=f"comma separated, of {', '.join(loras.CARDS)}")
    parser.add_argument("--lora-steps", type=int, default=0, help="0: as many as the plans say")
    parser.add_argument("--conditions", default=",".join(conditions.CARDS), help=f"comma separated, of {', '.join(conditions.CARDS)}")
    parser.add_argument("--condition-steps", type=int, default=0, help="of every stage of a condition; 0: as many as its plan says")
    parser.add_argument("--pairs", type=int, default=0, help="pictures with their conditions, for every stage; 0: as many as it says")
    parser.add_argument("--base", type=Path, default=POCKET, help="of pool and gates: the Pocket folder whose sd/ learns, and whose clip/ measures (or --judge)")
    parser.add_argument("--of", default="sd", choices=("sd", "flux"), help="of pool and gates: which model in --base learns")
    parser.add_argument("--kind", default="rank-text", choices=tuple(gates.KINDS), help="of gates")
    parser.add_argument("--gate-steps", type=int, default=250)
    parser.add_argument("--count", type=int, default=0, help="of pool: the first so many LoRAs; 0: all")
    parser.add_argument("--encoder-steps", type=int, default=1000, help="of the transformer that the weight encoder is compared with; 0 leaves it out")
    parser.add_argument("--part", default="1/1", help="of pool: K/N makes every N-th group from the K-th on, for N processes beside one another")
    parser.add_argument("--together", type=int, default=1, help="LoRAs that train as one batch; each takes its own rows (of pool 8 at least)")
    parser.add_argument("--judge", type=Path, help="a judge's folder for flux-conditions-measure, when it is not --out's clip/")
    parser.add_argument("--measured", type=float, default=1.0, help="share of the usual renders and pictures that are measured on")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    stages = STAGES if args.stage == "all" else (args.stage,)
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.work / "art"
    if "art" in stages and not folder.is_dir():
        art.make(args.packages, folder, args.size)
    if set(POOL) & set(stages):
        _pool(args, stages, folder)
    if not set(stages) <= {"art", *THIRD, *POOL}:
        _bases(args, stages, folder)
    if set(THIRD) & set(stages):
        _third(args, stages, folder)


def _bases(args: argparse.Namespace, stages: Sequence[str], folder: Path) -> None:
    """Both bases, their judge and their LoRAs."""
    grounds = variants([*PLACES, *HELD_PLACES], args.size, args.variants, workers=args.workers)
    _base(args, stages, folder, grounds)
    if "judge" in stages:
        _judge(args, Source(folder, args.size, objects=args.objects, places=args.places, grounds=grounds))
    if {"loras", "previews", "measure", "controlnet", "controlnet-measure", *SECOND} & set(stages):
        world = _world(args, folder, grounds, also=ALSO)
        _first(args, stages, world)
        _controlnet(args, stages, world)
        if set(SECOND) & set(stages):
            _second(args, stages, folder, world)


def _world(args: argparse.Namespace, folder: Path, grounds: Mapping[str, np.ndarray], also: Sequence[str] = ()) -> World:
    return World(folder, objects=args.objects, places=args.places, size=args.size, vendors=args.vendors.split(","), also=also,
                 variants=args.variants, strange=strange_words(folder), grounds=grounds)  # fmt: skip


def _base(args: argparse.Namespace, stages: Sequence[str], folder: Path, grounds: Mapping[str, np.ndarray]) -> None:
    """The stages up to the exported first base."""
    device, blocks = torch.device(args.device), tuple(int(b) for b in args.blocks.split(","))
    more = {"device": device, "compiled": args.compile}
    words = CLIPTokenizer.from_pretrained(args.begin / "tokenizer") if args.begin else tokenizer.build(tokenizer.corpus(folder))
    if {"autoencoder", "polish"} & set(stages):
        wide = autoencoder.wide_world(folder, args.size, args.vendors.split(","), grounds)
    if "autoencoder" in stages:
        autoencoder.train(wide, args.work, minutes=_minutes(args, "autoencoder"), workers=args.workers, **more)
    if {"base", "polish", "export"} & set(stages):
        vae = AutoencoderKL.from_pretrained(args.work / "vae")
    if "base" in stages:
        base.train(_world(args, folder, grounds), vae, words, args.work, minutes=_minutes(args, "base"), size=args.batch,
                   blocks=blocks, fine=args.fine, begin=args.begin, workers=args.workers, **more)  # fmt: skip
    if "polish" in stages:
        scenes = autoencoder.stock(wide, POLISHED + Loop.reached(args.work / "polish.pt"))
        with drawn_ahead([scenes], args.workers):
            pool = autoencoder.with_latents(vae.to(device), scenes, device)
            loop = autoencoder.polish(vae, pool, args.work, minutes=_minutes(args, "polish"), **more)
        print(f"decoder: {loop.seen} pictures more, {autoencoder.psnr(vae, autoencoder.some(wide, autoencoder.FRESH, 256)):.2f} dB on fresh scenes", flush=True)
        vae.save_pretrained(args.work / "vae")
    if "export" in stages:
        model, cost = base.trained(vae.cpu(), words, args.work, blocks, args.fine)
        export.export(model, vae, words, args.out / "sd")
        print("exported after", json.dumps(cost))


def _judge(args: argparse.Namespace, source: Source) -> None:
    words, folder = judge.vocabulary(source), args.out / "clip"
    scenes = judge.stock(source, words, START + Loop.reached(args.work / "judge.pt"))
    with drawn_ahead([scenes], args.workers):
        judge.train(source.named, words, scenes, folder, args.work, minutes=_minutes(args, "judge"), device=torch.device(args.device),
                    compiled=args.compile)  # fmt: skip
    _keep(args.work, "judge", presence.settle(folder, source, args.measured))
    confusion.settle(folder, source, each=max(2, round(200 * args.measured)))


def _first(args: argparse.Namespace, stages: Sequence[str], world: World) -> None:
    """The first base's LoRAs, and its figures."""
    if not {"loras", "previews", "measure"} & set(stages):
        return
    names, files = args.loras.split(","), args.out / "loras"
    pipe = StableDiffusionPipeline.from_pretrained(args.out / "sd").to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if "loras" in stages:
        loras.make(pipe, world, names, files, args.work, plan=_plan(args, loras.PLAN), together=args.together, workers=args.workers)
        for name in names:
            if loras.CARDS[name].category != "character":
                shorten(files / f"{loras.stem(name)}.safetensors", loras.SHORT)
        testbed.write(args.out / "testbed.json")
    if "previews" in stages:
        previews.make(pipe, names, files, Judge.open(str(args.out / "clip"), args.device))
        loras.profiled(pipe, names, files, args.out / "profiles")
    if "measure" in stages:
        _measured(args, "base", "loras", pipe, world, files, names)


def _controlnet(args: argparse.Namespace, stages: Sequence[str], world: World) -> None:
    """The first base's ControlNet, and its figures."""
    folder = args.out / controlnet.FOLDER
    if "controlnet" in stages:
        controlnet.train(world, args.out / "sd", args.work, folder, minutes=_minutes(args, "controlnet"), device=torch.device(args.device),
                         workers=args.workers)  # fmt: skip
    if "controlnet-measure" in stages:
        pipe = StableDiffusionPipeline.from_pretrained(args.out / "sd").to(args.device)
        pipe.set_progress_bar_config(disable=True)
        engine, clip_judge = Engine(backbones.of(pipe, "sd"), "pocket"), Judge.open(str(args.out / "clip"), args.device)
        _keep(args.work, "controlnet", controlnet.figures(engine, clip_judge, world, folder, _share(args, 100), args.work / "controlnet.png"))


def _second(args: argparse.Namespace, stages: Sequence[str], art: Path, world: World) -> None:
    """The stages of the small FLUX, on the exported first base."""
    folder, files = args.out / "flux", args.out / "flux-loras"
    if "flux" in stages:
        _flux(args, art, world, folder)
    if not set(SECOND[1:]) & set(stages):
        return
    names = [name for name in args.loras.split(",") if name in loras.FLUX]
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if "flux-loras" in stages:
        loras.make(pipe, world, names, files, args.work, plan=_plan(args, loras.FLUX_PLAN), together=args.together,
                   workers=args.workers, base="pocket-flux")  # fmt: skip
        trained = [name for name in loras.FLUX if (files / f"{loras.stem(name)}.safetensors").is_file()]
        testbed.write(args.out / "testbed-flux.json", trained)
    if "flux-previews" in stages:
        previews.make(pipe, names, files, Judge.open(str(args.out / "clip"), args.device), base="pocket-flux")
        loras.profiled(pipe, names, files, args.out / "profiles", base="pocket-flux")
    if "flux-measure" in stages:
        _measured(args, "flux", "flux-loras", pipe, world, files, names)


def _third(args: argparse.Namespace, stages: Sequence[str], art: Path) -> None:
    """The condition LoRAs of the exported second base, and their figures."""
    names, files = args.conditions.split(","), args.out / "flux-conditions"
    pipe = FluxPipeline.from_pretrained(args.out / "flux", dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    world = conditions.world_of(art, pipe.vae.config.sample_size, args.objects, args.places, args.vendors.split(","), args.variants, args.workers)
    own = list(OBJECTS)[: args.objects]
    if "flux-conditions" in stages:
        conditions.make(pipe, world, own, names, files, args.work, steps=args.condition_steps, count=args.pairs, workers=args.workers)
    if "flux-conditions-measure" in stages:
        judge = Judge.open(str(args.judge or args.out / "clip"), args.device)
        _keep(args.work, "conditions", controlled.figures(pipe, judge, world, own, files, names, partial(_share, args), args.work / "sheets"))


def _pool(args: argparse.Namespace, stages: Sequence[str], art: Path) -> None:
    """The pool of LoRAs of a first base, in --out's pool/, and what the judge sees of them."""
    second = args.of == "flux"
    pipe = (FluxPipeline if second else StableDiffusionPipeline).from_pretrained(args.base / args.of).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    some, folder, (part, parts) = pool.entries(art), args.out / ("pool-flux" if second else "pool"), map(int, args.part.split("/"))
    some = some[: args.count or None]
    if "pool" in stages:
        pool.make(pipe, art, some, folder, args.work, plan=_plan(args, pool.FLUX_PLAN if second else pool.PLAN), base="pocket-flux" if second else "pocket", together=max(args.together, pool.TOGETHER), part=(part, parts),
                  over=pool.spent(args.budget))  # fmt: skip
    if "pool-measure" in stages:
        _keep(args.work, "pool", pool.figures(pipe, Judge.open(str(args.judge or args.base / "clip"), args.device), art, some, folder, _share(args, 12)))
    if "gates" in stages:
        gates.make(pipe, art, folder, args.out / ("gates-flux.safetensors" if second else "gates.safetensors"), args.work, args.kind, steps=args.gate_steps,
                   base="pocket-flux" if second else "pocket")  # fmt: skip
    if {"pool-looks", "encoder"} & set(stages):
        _encoder(args, stages, pipe, folder)


def _encoder(args: argparse.Namespace, stages: Sequence[str], pipe: StableDiffusionPipeline, folder: Path) -> None:
    """What the judge sees of the pool's LoRAs, and the weight encoder that is trained on them, in --out's encoder/."""
    rows, looks, clip_judge, seen = encoder.rows_of(folder), args.work / "looks", Judge.open(str(args.base / "clip"), args.device), None
    clip_judge.name = f"pocket {clip_judge.name.rpartition(' ')[2]}"  # as it is called where it is bundled
    if "pool-looks" in stages or (looks / "base.json").is_file():
        with Engine(backbones.of(pipe, "sd"), "pocket") as engine:
            seen = encoder.looks(engine, clip_judge, folder, rows, looks)
    if "encoder" in stages:
        loras = encoder.updates(folder, rows, args.base / "sd")
        encoder.fitted(rows, loras, clip_judge, seen).save(args.out / "encoder")
        model = LinearEncoder.open(args.out / "encoder")  # as it ships, in half precision
        by_weights = {"weights": encoder.Weights(model.encode(loras), model.read)}
        if args.encoder_steps:
            read = encoder.sketches(folder, rows, args.base / "sd")
            other = encoder.transformed(rows, read, clip_judge, seen, args.work / "encoder.pt", training.Plan(steps=args.encoder_steps))
            by_weights["weights, by a transformer on sketches"] = encoder.Weights(other.encode(read), other.read)
        _keep(args.work, "encoder", encoder.figures(rows, clip_judge, seen, by_weights))


def _flux(args: argparse.Namespace, art: Path, world: World, folder: Path) -> None:
    clip = CLIPTokenizer.from_pretrained(args.out / "sd/tokenizer")
    t5 = T5Tokenizer.from_pretrained(args.begin_flux / "tokenizer_2") if args.begin_flux else unigram.build(tokenizer.corpus(art))
    vae = AutoencoderKL.from_pretrained(args.out / "sd/vae", dtype=torch.float32)
    pictures, _ = batch(world, flux.UNSEEN, 512)
    with torch.no_grad():
        flux.settle(vae, torch.cat([vae.encode(autoencoder.tensor(part)).latent_dist.mean for part in np.split(pictures, 8)]))
    scenes = base.stock(world, flux.reader(clip, t5), Loop.reached(args.work / "flux.pt"))
    with drawn_ahead([scenes], args.workers):
        model = flux.train(scenes, vae, clip, t5, args.out / "sd", args.work, minutes=_minutes(args, "flux"),
                           device=torch.device(args.device), settings=flux.Settings(args.batch, compiled=args.compile), begin=args.begin_flux,
                           peak=args.flux_peak)  # fmt: skip
    if not joined()[0]:  # the first of the processes that train together
        export.export_flux(model.cpu(), vae.cpu(), clip, t5, folder)


def _measured(args: argparse.Namespace, first: str, second: str, pipe: object, world: World, files: Path, names: Sequence[str]) -> None:
    """Figures of a base and of its LoRAs."""
    clip_judge, share = Judge.open(str(args.out / "clip"), args.device), partial(_share, args)
    _keep(args.work, first, measure.base_figures(pipe, clip_judge, world, share(200)))
    _keep(args.work, second, measure.lora_figures(pipe, clip_judge, world, files, names, share(40), share(200)))


def _share(args: argparse.Namespace, count: int) -> int:
    return max(2, round(count * args.measured))


def _minutes(args: argparse.Namespace, stage: str) -> float:
    return args.budget * SHARES[stage]


def _plan(args: argparse.Namespace, plan: loras.Plan) -> loras.Plan:
    return replace(plan, steps=args.lora_steps or plan.steps)


def _keep(work: Path, name: str, figures: dict) -> None:
    """Print the figures and write them beside the checkpoints."""
    text = json.dumps(figures, indent=2)
    (work / f"figures-{name}.json").write_text(text + "\n")
    print(name, text, flush=True)


if __name__ == "__main__":
    main()
