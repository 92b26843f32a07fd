"""``python -m assets.recipe.gpu train``: in minutes on one GPU, everything that builds on a trained first base.

Its LoRAs, a better decoder, the judge, the second base and that one's LoRAs take turns (`tasks`), while other processes draw scenes for
the next ones. What is finished is written at once, as parcels. ``unpack`` writes the parcels into a Pocket folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from . import autoencoder, base, flux, judge, loras, parcel, tasks, tokenizer, unigram
from .drawing import Shared, drawn_ahead
from .gpu_stages import LoraStage, Stages
from .labelled import ALSO, START, Source
from .places import HELD_PLACES, PLACES, variants
from .tasks import Task
from .world import World, batch, strange_words

VENDORS = ("noto", "noto", "noto", "twemoji", "fluent")
SHARES = {"loras": 115, "polish": 90, "flux": 140, "judge": 90, "flux-loras": 50}  # of the time
EAGER = (True, False)  # compiled first
POLISHED = 10**8 + 10**7  # scene numbers from here on are what the decoder is polished on


class Sizes(NamedTuple):
    """Rows of a batch by stage, scenes drawn in all, and the settings of the second base to try, the fastest first."""

    polish: int = 64
    judge: int = 768
    wide: int = 65_536
    labelled: int = 262_144
    scenes: int = 393_216
    taught: int = 768
    fresh: int = 512
    variants: int = 160
    trial: int = loras.TRIAL
    chunk: int = 256
    flux: tuple[flux.Settings, ...] = (
        flux.Settings(768), flux.Settings(768, half_text=False), flux.Settings(256, half_text=False, blas="cublaslt"),
        flux.Settings(256, half_text=False, compiled=False), flux.Settings(256, half=False, compiled=False),
        flux.Settings(64, half=False, compiled=False, blas="cublas"),
    )  # fmt: skip


TINY = Sizes(2, 8, 64, 64, 64, 8, 8, 2, 2, 16, (flux.Settings(4, compiled=False),))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.recipe.gpu", description=__doc__)
    parser.add_argument("what", choices=("train", "unpack"))
    parser.add_argument("--art", type=Path, help="what the stage `art` rendered")
    parser.add_argument("--base", type=Path, help="the first base's folder")
    parser.add_argument("--out", type=Path, required=True, help="where parcels are written; to unpack: the Pocket folder")
    parser.add_argument("--parcels", type=Path, help="to unpack: where they are")
    parser.add_argument("--work", type=Path, default=Path(".work/gpu"), help="checkpoints, logs and files before they are packed")
    parser.add_argument("--until", type=float, help="when everything ends, in seconds since 1970; or")
    parser.add_argument("--seconds", type=float, default=540, help="from now")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--only", default=",".join(SHARES), help="the stages to run")
    parser.add_argument("--tiny", action="store_true", help="small enough for a processor to run all of it in a few minutes")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.what == "unpack":
        unpack(args.parcels, args.base, args.out)
        return
    deadline = args.until or time.time() + args.seconds
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # until processes are forked: threads do not outlive that
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args, TINY if args.tiny else Sizes(), deadline - 15 - tasks.LAST)
    logged(args.work, args.out)
    for file in sorted(args.work.glob("*.log")):
        print(f"--- {file.name}", *file.read_text(errors="replace").splitlines()[-8:], sep="\n", flush=True)
    print(f"{time.strftime('%X')} all done, {deadline - time.time():.0f} s left", flush=True)


def train(args: argparse.Namespace, sizes: Sizes, until: float) -> None:
    """All stages by the moment ``until``."""
    report = lambda *what: print(time.strftime("%X"), *what, flush=True)  # noqa: E731
    grounds = variants([*PLACES, *HELD_PLACES], 128, sizes.variants, workers=args.workers)
    report("places drawn")
    shape = {"size": 128, "vendors": VENDORS, "variants": sizes.variants, "grounds": grounds}
    world = World(args.art, objects=48, places=len(PLACES), also=ALSO, strange=strange_words(args.art), **shape)
    names = [*loras.CARDS] if not args.tiny else ["raccoon", "moon", "scarf"]
    taught = loras.drawn(world, names, sizes.taught, args.workers)
    report("scenes of the LoRAs drawn")
    plan, second = (replace(plan, steps=2, batch=2) if args.tiny else plan for plan in (loras.PLAN, loras.FLUX_PLAN))
    last = loras.Group(tuple(name for name in names if name in loras.FLUX), second)
    common = (args.base, args.out, args.work, torch.device(args.device))
    held = {name: (Shared.of(pictures), prompts) for name, (pictures, prompts) in taught.items()}
    groups = [LoraStage(*common, group, {name: held[name] for name in group.names}, trial=sizes.trial) for group in loras.groups(names, plan, 24)]
    chosen = args.only.split(",")
    first = [Task("loras" if number == 0 else "loras-longer", group.run, SHARES["loras"], (None, None), beside=number > 0)
             for number, group in enumerate(groups) if "loras" in chosen]  # fmt: skip
    threads = 1 if args.tiny else 4
    for task in first:
        task.start(args.work / f"{task.name}.log", threads)  # the rest is made while it gets ready
    wide = autoencoder.wide_world(args.art, 128, VENDORS, grounds)
    source = Source(args.art, 128, grounds=grounds)
    words = judge.vocabulary(source)
    clip, t5 = tokenizer.CLIPTokenizer.from_pretrained(args.base / "tokenizer"), unigram.build(tokenizer.corpus(args.art))
    report("worlds and tokenizers made")
    sized = lambda count: {"chunk": sizes.chunk, "chunks": count // sizes.chunk, "slots": count}  # noqa: E731
    stocks = [autoencoder.stock(wide, POLISHED, **sized(sizes.wide)), base.stock(world, flux.reader(clip, t5), 0, **sized(sizes.scenes)),
              judge.stock(source, words, START, **sized(sizes.labelled))]  # fmt: skip
    with drawn_ahead(stocks, args.workers):
        report("drawing")
        fresh, (unseen, _) = autoencoder.some(wide, autoencoder.FRESH, sizes.fresh), batch(world, flux.UNSEEN, sizes.fresh)
        stages = Stages(*common, sizes, source.named, words, clip, t5, Shared.of(fresh), Shared.of(unseen), *stocks)
        eager = (False,) if args.tiny else EAGER
        fluxed = Task("flux", stages.flux, SHARES["flux"], sizes.flux)
        rest = [Task("polish", stages.polish, SHARES["polish"], eager), fluxed, Task("judge", stages.judge, SHARES["judge"], eager),
                Task("flux-loras", LoraStage(*common, last, {name: held[name] for name in last.names}, True, sizes.trial).run, SHARES["flux-loras"],
                     (None, None), after=[fluxed])]  # fmt: skip
        tasks.take_turns([*first, *(task for task in rest if task.name in chosen)], until, args.work, threads=threads,
                         tick=Logs(args.work, args.out))  # fmt: skip
        report("drawn:", *(f"{stock.drawn * stock.chunk}" for stock in stocks))


class Logs:
    """Called often; now and then it writes every task's output so far as one file."""

    def __init__(self, work: Path, out: Path, every: float = 20) -> None:
        self.work, self.out, self.every, self.last = work, out, every, 0.0

    def __call__(self) -> None:
        if time.time() > self.last + self.every:
            self.last = time.time()
            logged(self.work, self.out)


def logged(work: Path, out: Path) -> None:
    """Every task's output so far as one file."""
    half = out / "logs.half"
    with tarfile.open(half, "w:gz") as archive:
        for file in sorted(work.glob("*.log")):
            archive.add(file, file.name)
    half.replace(out / "logs.tar.gz")


def unpack(parcels: Path, first: Path, out: Path) -> None:
    """Write the parcels that arrived into a Pocket folder: the base with its new decoder, the LoRAs, the judge, and the second base."""
    shutil.copytree(first, out / "sd", dirs_exist_ok=True, copy_function=shutil.copyfile)
    for name in sorted({file.name.split(".")[0] for file in parcels.glob(f"*{parcel.SUFFIX}")}):
        parcel.unpack(parcels, name, out)
        print("unpacked", name)
    decoder = out / "decoder.safetensors"
    if decoder.is_file():
        autoencoder.with_decoder(out / "sd/vae", decoder)
        decoder.unlink()
    weights = "diffusion_pytorch_model.safetensors"
    if (out / "flux/vae").is_dir():
        shutil.copyfile(out / "sd/vae" / weights, out / "flux/vae" / weights)


if __name__ == "__main__":
    main()
