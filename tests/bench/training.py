"""Steps a second of the trainer for one, four and sixteen concepts on Pocket.

    python -m tests.bench.training [--concepts 1,4,16] [--batch 4] [--steps 12] [--device cpu] [--precision half] [--compiled]

Random latents and a hundred prompts for each concept; attention, feed-forward and convolutions, rank 8, a share of rows
kept to the base. The first steps are not counted. Rows a second say what company is worth: with a cost per step that
does not grow with the number of concepts they grow in proportion, until the arithmetic fills the device.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from composition import backbones
from composition.adapters import Adapters
from composition.training.concept import Concept, Plan, train

FIRST = 3  # steps before the clock starts


def measure(backbone, adapters: Adapters, count: int, asked: argparse.Namespace) -> float:
    """Seconds of a step."""
    side, channels = backbone.denoiser.config.sample_size, backbone.denoiser.config.in_channels
    rng = torch.Generator().manual_seed(0)
    concepts = [Concept(f"c{k}", torch.randn(100, channels, side, side, generator=rng), [f"a fox in place {k} {i}" for i in range(100)],
                        others=["an owl", "a house"]) for k in range(count)]  # fmt: skip
    plan = Plan(rank=8, steps=asked.steps + FIRST, batch=asked.batch, targets=("attention", "feed_forward", "convolution"),
                keep=0.15, half=asked.precision == "half")  # fmt: skip
    stamps = []

    def stamp(step: int, losses) -> None:
        if step in (FIRST, plan.steps):
            if backbone.device.type == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    more = {"compiled": True} if asked.compiled else {}
    with tempfile.TemporaryDirectory() as folder:
        train(backbone, adapters, concepts, plan, Path(folder), on_step=stamp, **more)
    return (stamps[1] - stamps[0]) / asked.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default="1,4,16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("single", "half"), default="single")
    parser.add_argument("--compiled", action="store_true")
    asked = parser.parse_args()
    backbone = backbones.open("pocket", device=asked.device, dtype="float32")
    adapters = Adapters(backbone.components, family=backbone.family, block=backbone.block)
    size = sum(p.numel() for p in backbone.denoiser.parameters())
    print(f"Pocket, {size / 1e6:.1f} M parameters, on {asked.device}, {asked.precision} precision, {asked.batch} rows of each "
          f"concept, {asked.steps} steps, {torch.get_num_threads()} threads{', compiled' if asked.compiled else ''}")
    print(f"{'concepts':>10}{'ms a step':>12}{'steps/s':>10}{'rows/s':>10}")
    for count in map(int, asked.concepts.split(",")):
        seconds = measure(backbone, adapters, count, asked)
        print(f"{count:>10}{1000 * seconds:>12.1f}{1 / seconds:>10.2f}{count * asked.batch / seconds:>10.1f}", flush=True)
    adapters.close()


if __name__ == "__main__":
    main()
