"""What CMLoRA costs at Stable Diffusion 1.5's true size, random weights: counted and timed, in passes of the bare base.

    python -m tests.bench.cmlora [--sizes 2,3,4,5] [--pixels 512] [--rounds 3] [--steps 50] [--count-only]

Counted: multiply-adds of linear layers and convolutions, attention products left out. Timed: a step with n LoRAs asked in full
and the others from the cache, for every n that the schedule has, interleaved with the bare base; a run's cost is the mean over
its steps. That a cached pass of age 0 is the full pass is checked first.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

import composition
from composition import Lora, Request
from composition.adapters import Adapters
from composition.backbones.unet import UNetBackbone
from composition.hooks.cache.unet import FeatureCache
from composition.loop import Step
from composition.methods import cmlora
from composition.run import Run

RANK = 16
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CATEGORIES = ("character", "clothing", "style", "object", "place")


class Slots(FeatureCache):
    """Which slots are filled, and nothing else."""

    def __init__(self):
        self.filled = set()

    def has(self, name):
        return name in self.filled


class Empty(Run):
    """A run that draws nothing."""

    def __init__(self, names, categories):
        self.request = SimpleNamespace(names=names, active={name: Lora(name) for name in names})
        self.categories, self.notes, self.always = categories, {}, {}

    def live(self, step):
        return dict.fromkeys(self.names, 1.0)

    def passes(self, step, conds=None, others_weight=0.0):
        return []

    def denoise_passes(self, step, passes, rows="all", *, cache, full):
        cache.filled |= set(full)
        return torch.zeros(len(self.names), 1, 1, 4, 8, 8)

    def guide(self, rows):
        return rows[-1]


def schedule(count: int, steps: int, **options: object) -> list[int]:
    """How many LoRAs are asked in full at each step, from the method itself on an empty run."""
    names = tuple("abcde"[:count])
    run = Empty(names, dict(zip(names, [*CATEGORIES[: count - 1], "place"], strict=True)))
    course = cmlora._Course(run, cmlora.Options(**options), Slots())
    for index in range(steps):
        course.predict(Step(index, steps, torch.tensor(0), torch.zeros(1, 4, 8, 8)))
    return [len(full) for full in run.notes["cmlora"]["full"]]


def cost(fulls: list[int], count: int, share: float) -> float:
    """Passes of the bare base a step, when a cached one costs `share`."""
    return sum(n + (count - n) * share for n in fulls) / len(fulls)


def sd15(device: str) -> tuple[UNet2DConditionModel, UNetBackbone]:
    """Stable Diffusion 1.5's UNet with random weights."""
    config = Path(composition.__file__).parent / "backbones/loading/configs/sd15/unet/config.json"
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(json.loads(config.read_text())).eval().requires_grad_(False)
    return unet, UNetBackbone(SimpleNamespace(unet=unet, scheduler=None, _execution_device=device), "sd")


def lora(model: nn.Module, path: Path, seed: int, component: str = "unet", ends: tuple[str, ...] = ATTENTION) -> Path:
    """A LoRA of every layer whose name ends so, of rank RANK, in diffusers' layout."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.endswith(ends):
            out, inner = module.weight.shape
            tensors[f"{component}.{name}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) / inner**0.5
            tensors[f"{component}.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.01
    save_file(tensors, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="2,3,4,5")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--count-only", action="store_true")
    given = parser.parse_args()
    sizes, side = [int(size) for size in given.sizes.split(",")], given.pixels // 8
    unet, backbone = sd15("meta" if given.count_only else "cpu")
    cache = FeatureCache(unet)
    share = cache.share(backbone.axis, (side, side), 77)
    print(f"SD1.5, {given.pixels} px, {given.steps} steps; a cached pass counts {share:.3f} of a full one")
    plans = {size: {"cmlora": schedule(size, given.steps), "reference": schedule(size, given.steps, reference=True)} for size in sizes}
    for size, plan in plans.items():
        told = ", ".join(f"{name} {cost(fulls, size, share):.2f}" for name, fulls in plan.items())
        print(f"N = {size}, counted: composite {size:.2f}, {told} passes a step")
    if given.count_only:
        return
    with TemporaryDirectory() as folder, torch.no_grad():
        adapters = Adapters({"unet": unet}, family="sd", block=backbone.block)
        files = [lora(unet, Path(folder) / f"{name}.safetensors", k) for k, name in enumerate("abcde")]
        for size in sizes:
            names = list("abcde"[:size])
            with adapters.session([(n, Lora(n), f) for n, f in zip(names, files, strict=False)]):
                timed(backbone, adapters, cache, names, plans[size], side, given.rounds)


def timed(backbone, adapters, cache, names, plan, side, rounds) -> None:
    """Print the times of one number of LoRAs, over the bare base's in the same rounds."""
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, side, side, generator=generator), torch.randn(2, 1, 77, 768, generator=generator)
    request = Request("", loras=[Lora(name) for name in names], guidance=5.0)
    encodings = {("text", "", "", ()): text}
    unscaled = SimpleNamespace(scale_model_input=lambda latents, t: latents)
    run = Run(backbone, adapters, request, unscaled, [], encodings=encodings)
    step = Step(0, 1, torch.tensor(500), latents)

    def once(full):
        run.denoise(step, {}) if full == "base" else run.denoise_passes(step, run.passes(step), cache=cache, full=names[:full])

    counts = sorted({n for fulls in plan.values() for n in fulls} | {len(names)})
    with cache.attached():
        first, again = (run.denoise_passes(step, run.passes(step), cache=cache, full=full) for full in (names, []))
        if (first - again).abs().max() > 1e-4 * first.abs().max():
            raise SystemExit("a cached pass of age 0 is not the full pass")
        times = {n: [] for n in ["base", *counts]}
        for _ in range(rounds):
            for n in times:
                begun = time.perf_counter()
                once(n)
                times[n].append(time.perf_counter() - begun)
    bare = statistics.median(times["base"])
    ratio = {n: statistics.median(values) / bare for n, values in times.items()}
    print(f"N = {len(names)}, timed over the base ({bare:.2f} s): composite {ratio[len(names)]:.2f}, " + ", ".join(
        f"{name} {sum(ratio[n] * times for n, times in Counter(fulls).items()) / len(fulls):.2f}" for name, fulls in plan.items())
        + f"; a step with {', '.join(f'{n} in full {ratio[n]:.2f}' for n in counts)}", flush=True)


if __name__ == "__main__":
    main()
