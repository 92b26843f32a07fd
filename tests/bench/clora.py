"""What CLoRA costs at Stable Diffusion 1.5's true size, random weights, 256 px: the memory of guided steps, and CLoRA fast's time.

    python -m tests.bench.clora [--sizes 2,4,8] [--full 2,3] [--rounds 3] [--pixels 256] [--skip memory|time]

Memory: three guided steps, each a move of the latents and the fused prediction, one LoRA after the other, in a process of its own; what
is told is the resident set's peak over what it was before, weights and one plain prediction included. `two-phase` takes the gradient pass
by pass, `full graph` all at once. Time: a step of CLoRA fast over the bare base's in the same rounds, the passes that read the masks
counted in for the share of the steps that have one.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch

from composition import Lora, Request
from composition.adapters import Adapters
from composition.loop import Conditioning, Step
from composition.methods import clora, clora_fast
from composition.run import Run
from tests.bench.cmlora import lora, sd15

WORDS = ("fox", "owl", "cat", "dog", "hen", "pig", "cow", "rat")


class Resident:
    """The resident set's peak in a block, sampled every millisecond, in MiB over what it was."""

    def __enter__(self):
        gc.collect()
        self.before = self.peak = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        self.extra = self.peak - self.before

    def _watch(self):
        while not self._over.wait(0.001):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def made(stack, count, pixels, method, batched):
    """A run with `count` LoRAs bound to as many words, its encodings random; and its first step."""
    unet, backbone = sd15("cpu")
    names = WORDS[:count]
    folder = Path(stack.enter_context(TemporaryDirectory()))
    files = [lora(unet, folder / f"{name}.safetensors", k) for k, name in enumerate(names)]
    adapters = Adapters({"unet": unet}, family="sd", block=backbone.block, axis=backbone.axis)
    loras = [Lora(name, binds=name) for name in names]
    stack.enter_context(adapters.session(list(zip(names, loras, files, strict=True))))
    prompt = " and ".join(names)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 1, 77, 768, generator=generator)
    ends = [(0, 0)]
    for name in prompt.split():
        at = prompt.index(name, ends[-1][1])
        ends.append((at, at + len(name)))
    backbone.offsets = lambda text: [*ends, (0, 0)]
    backbone.truncated = lambda text: ""
    backbone.size = lambda request: (pixels, pixels)
    request = Request(prompt, loras=loras, method=method, batched=batched, guidance=5.0)
    backbone.encode, backbone.chunks = (lambda *_, **__: Conditioning({"text": text})), (lambda prompt: 1)
    unscaled = SimpleNamespace(scale_model_input=lambda latents, t: latents)
    run = Run(backbone, adapters, request, unscaled, [])
    latents = torch.randn(1, 4, pixels // 8, pixels // 8, generator=generator)
    return run, Step(0, 50, torch.tensor(500), latents)


def memory(count, pixels, two_phase, batched):
    """MiB over a plain prediction for three guided steps."""
    with ExitStack() as stack, torch.no_grad():
        run, step = made(stack, count, pixels, "clora", batched)
        options = clora.Options(rounds=0, stop=0.0, two_phase=two_phase)
        run.denoise(step, {})
        predict = stack.enter_context(clora.compose.compose(run, options))
        with Resident() as resident:
            for index in range(3):
                predict(step._replace(index=index))
        return resident.extra


def timed(count, pixels, rounds):
    """CLoRA fast's step over the base's, and a pass that reads masks over it."""
    with ExitStack() as stack, torch.no_grad():
        run, step = made(stack, count, pixels, "clora-fast", True)
        options = clora_fast.Options()
        predict = stack.enter_context(clora_fast.compose.compose(run, options))
        predict(step)
        ways = {"base": lambda: run.denoise(step, {}), "read": lambda: predict(step), "kept": lambda: predict(step._replace(index=40))}
        times = {name: [] for name in ways}
        for _ in range(rounds):
            for name, call in ways.items():
                begun = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begun)
        base, read, kept = (statistics.median(times[name]) for name in ways)
        whole = options.read * read + (1 - options.read) * kept
        print(f"time, N = {count}: clora-fast {whole / base:.2f} of the base ({base:.2f} s a step); {read / base:.2f} while masks are read, "
              f"{kept / base:.2f} after", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="2,4,8")
    parser.add_argument("--full", default="2,3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--skip", choices=["memory", "time"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        count, kind = given.one.split(":")
        print(memory(int(count), given.pixels, kind != "full", kind == "batched"))
        return
    if given.skip != "memory":
        sizes = [int(size) for size in given.sizes.split(",")]
        asked = [(n, "two-phase") for n in sizes] + [(int(n), "full") for n in given.full.split(",") if n] + [(max(sizes), "batched")]
        told = {}
        for count, kind in asked:
            call = [sys.executable, "-m", "tests.bench.clora", "--one", f"{count}:{kind}", "--pixels", str(given.pixels)]
            told[count, kind] = float(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
            words = {"full": "full graph", "batched": "two-phase, predictions in one batch"}.get(kind, kind)
            print(f"memory, N = {count}, {words}: {told[count, kind]:.0f} MiB", flush=True)
        print(f"two-phase, N = {sizes[-1]} over N = {sizes[0]}: {told[sizes[-1], 'two-phase'] / told[sizes[0], 'two-phase']:.2f}")
    if given.skip != "time":
        for count in (4, 2, 3):
            timed(count, given.pixels, given.rounds)


if __name__ == "__main__":
    main()
