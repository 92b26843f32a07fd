"""What methods that fuse LoRAs cost at Stable Diffusion 1.5's and FLUX.1's true widths, random weights: a step, the set-up, memory.

    python -m tests.bench.fusion [--family sd,flux] [--methods ssr,np-lora] [--counts 2,4] [--pixels 512|1024] [--tokens 512] [--double 1]
                                 [--single 2] [--whole] [--rounds 3] [--device cpu] [--dtype float32] [--tiny]

A step is asked beside the bare base's and beside Merge's with its LoRAs live (rank 16 on every attention projection, of FLUX on the single blocks'
feed-forward too), in the same rounds; ratios are medians of those within a round, and "the base again" is the machine's own noise. Folded
is a step of a method whose LoRAs lie in the weights: what Merge folded costs, and the bare base. Blocks are alike, so one level of Stable
Diffusion's UNet (320 wide at an eighth of the pixels; --whole: all of them) and a few of FLUX.1's 19 double and 38 single blocks (twice as many single
as double, as here) tell the whole's ratio. The set-up is what the first step takes over the others, and how many evaluations of it are the
method's measurements; memory is what the method then holds, and held at most, over the bare base's weights (on a processor the resident set, to
some MiB). Gates of autolora are untrained: they cost what trained ones do.
"""

import argparse
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from composition import Lora, Refused, Request, methods
from composition.adapters import Adapters
from composition.loop import Conditioning, Predict, Step
from composition.prompt_weights import Text, text_of
from composition.run import Run
from tests.bench.clora import WORDS, Resident
from tests.gpu import clock
from tests.gpu.models import SIZES, TOYS, Model, Size, gap

METHODS = ("merge", "ssr", "np-lora", "lego", "depth", "ranks", "topk", "entropy", "k-lora", "loratorio", "autolora-layer", "autolora-rank",
           "autolora-element")
CATEGORIES = ("style", "character", "object", "place")  # in turn, so that methods with roles have both
BARS = {"ssr": ("folded", 1.01), "np-lora": ("folded", 1.01), "autolora-rank": ("live", 1.25)}  # over the bare base
STEPS = 25
AGAIN = "the base again"


@dataclass
class Row:
    """A method's figures. over_base, over_merge: of a live step; folded: over the base, None where nothing is folded. seconds: of a live step;
    set_up: of what comes before it once, with so many evaluations; fold: of writing the weights. held, peak: MiB, live. gap: between the answers of the folded
    and the live step."""

    over_base: float
    over_merge: float
    seconds: float
    set_up: float
    evaluations: float
    held: float
    peak: float
    folded: float | None = None
    fold: float | None = None
    gap: float | None = None
    times: dict[str, list[float]] = field(default_factory=dict)


class Bench:
    """One denoiser with a number of LoRAs, beside it the same weights bare, and with the LoRAs always live."""

    def __init__(self, model: Model, count: int, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.latents, self.t, _ = model.inputs(model.size.rows)
        files = model.loras(folder, count)
        self.loras = [(word, Lora(word, category=CATEGORIES[k % len(CATEGORIES)], triggers=(word,)), files[k][2]) for k, word in enumerate(WORDS[:count])]
        self.weights = {name: 1.0 for name, _, _ in self.loras}
        self.backbone: Any = model.backbone
        self.backbone.encode, self.backbone.chunks = self._encode, lambda prompt: 1
        self.cond = self.backbone.encode(["all"], ["none"] if model.size.rows == 2 else None)
        if model.size.family == "flux":
            self.cond = Conditioning({**self.cond.values, "guidance": torch.full((1, 1), 3.5, device=model.device)})
        self.twin, self.merged = model.twin(), model.twin()
        self.stack = ExitStack()

    def __enter__(self) -> "Bench":
        self.adapters = self._session(self.model.backbone)
        self._session(self.merged).use(self.weights)
        for call in (self.bare, self.merge):  # what comes first warms up
            call()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _session(self, backbone: Any) -> Adapters:
        adapters = Adapters({self.model.size.component: backbone.denoiser}, family=self.model.size.family, block=backbone.block, axis=backbone.axis)
        self.stack.callback(adapters.close)
        self.stack.enter_context(adapters.session(self.loras))
        return adapters

    def _encode(self, prompts: Sequence[Text], negatives: Sequence[Text] | None, *_: object) -> Conditioning:
        """Random, another for every prompt."""
        like = self.model.inputs(1)[2].values
        sides = [*([negatives[0]] if negatives is not None else []), prompts[0]]

        def drawn(name: str, text: Text) -> Tensor:
            return torch.randn(like[name].shape[1:], generator=torch.Generator().manual_seed(zlib.crc32(text_of(text).encode()))).to(like[name])

        return Conditioning({name: torch.stack([drawn(name, text) for text in sides]) for name in like if name != "guidance"})

    def bare(self) -> Tensor:
        return self.twin.denoise(self.latents, self.t, self.cond)

    def merge(self) -> Tensor:
        return self.merged.denoise(self.latents, self.t, self.cond)

    @contextmanager
    def method(self, name: str, fold: list[float] | None = None) -> Iterator[tuple[Run, Predict]]:
        """The method of this name, nothing measured yet. fold: where the seconds of writing the weights go; None: they are left alone."""
        name, _, kind = name.partition("-") if name.startswith("autolora") else (name, "", "")
        options = {"gates": str(self._gates(kind))} if kind else {}
        request = Request(" and ".join(self.weights), loras=[lora for _, lora, _ in self.loras], method=name, options=options, steps=STEPS,
                          guidance=3.5 if self.model.size.family == "flux" else 5.0, model="bench")
        run = Run(self.backbone, self.adapters, request, SimpleNamespace(scale_model_input=lambda latents, t: latents), [torch.Generator().manual_seed(0)],
                  categories={name: lora.category for name, lora, _ in self.loras}, triggers={name: lora.triggers for name, lora, _ in self.loras},
                  folding=None if fold is None else partial(self._fold, fold))
        chosen = methods.find(name)
        with self.adapters.kept(), chosen.compose(run, chosen.read(options)) as predict, ExitStack() as stack:
            if fold is not None and chosen.steady:
                run.fold(stack)
            yield run, predict

    def _fold(self, seconds: list[float], stack: ExitStack) -> str:
        seconds.append(clock.timed(self.model.device, lambda: stack.enter_context(self.adapters.folded(self.weights)))[0])
        return ""

    def _gates(self, kind: str) -> Path:
        from composition.methods.shared import gating  # a method that is not there is not asked for its parts

        shapes = {path: module.weight.shape[0] for path, module in self.model.denoiser.named_modules() if path in self.adapters.stacks()}
        return gating.write(gating.Gating(gating.Design(kind, "bench", shapes)), self.folder / f"{kind}.gates.safetensors")  # type: ignore[arg-type]

    def step(self, index: int) -> Step:
        return Step(index, STEPS, self.t, self.latents)


def measured(bench: Bench, name: str, rounds: int) -> Row:
    """A method's row. Raises Refused where it refuses."""
    device = bench.model.device
    before = held(device)
    with bench.method(name) as (run, predict):
        with memory(device) as peak:
            first, answer = clock.timed(device, lambda: predict(bench.step(0)).value)
        evaluations = run.notes["evaluations"]
        predict(bench.step(1))
        evaluations -= run.notes["evaluations"] - evaluations
        kept = held(device) - before
        ways: dict[str, Callable[[int], Any]] = {
            "base": lambda index: bench.bare(), "live": lambda index: predict(bench.step(index)), "merge": lambda index: bench.merge(),
            AGAIN: lambda index: bench.bare()}
        times = rounds_of(device, ways, rounds)
    seconds = statistics.median(times["live"])
    row = Row(ratio(times, "live", "base"), ratio(times, "live", "merge"), seconds, max(first - seconds, 0.0), evaluations, kept, peak[0], times=times)
    spent: list[float] = []
    with bench.method(name, fold=spent) as (_, predict):
        again = predict(bench.step(0)).value
        if not spent:
            return row
        ways = {"base": lambda index: bench.bare(), "folded": lambda index: predict(bench.step(index))}
        times = rounds_of(device, ways, rounds)
    return replace(row, folded=ratio(times, "folded", "base"), fold=spent[0], gap=gap(again, answer))


def rounds_of(device: torch.device, ways: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, one after the other, at steps that go on from the third."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way, call in ways.items():
            times[way].append(clock.timed(device, lambda call=call, turn=turn: call(2 + turn % (STEPS - 2)))[0])
    return times


def ratio(times: Mapping[str, Sequence[float]], way: str, plain: str) -> float:
    return statistics.median(a / b for a, b in zip(times[way], times[plain], strict=True))


def held(device: torch.device) -> float:
    """MiB that tensors hold on the device; of a processor what the process does."""
    clock.free(device)
    return clock.allocated(device) / 2**20 if device.type == "cuda" else Resident._now()


@contextmanager
def memory(device: torch.device) -> Iterator[list[float]]:
    """The peak of a block in MiB over what there was, in a list."""
    if device.type == "cuda":
        with clock.peak(device, clock.allocated(device)) as peak:
            yield peak
        return
    found: list[float] = []
    with Resident() as resident:
        yield found
    found.append(resident.extra)


def told(label: str, name: str, row: Row) -> list[str]:
    """A method's figures as sentences, and its bar."""
    evaluations = f"{row.evaluations:g} evaluation{'s' * (row.evaluations != 1)}"
    lines = [f"{label} {name}: live {row.over_base:.3f} of the base, {row.over_merge:.3f} of Merge live ({row.seconds:.2f} s a step); set-up {row.set_up:.2f} s with "
             f"{evaluations} measured; {row.held:.0f} MiB held, {row.peak:.0f} at most"]
    if row.folded is not None:
        lines.append(f"{label} {name}: folded {row.folded:.3f} of the base; written in {row.fold:.2f} s; answer apart from the live one's by {row.gap:.2g}")
    if name in BARS:
        way, bar = BARS[name]
        value = row.folded if way == "folded" else row.over_base
        noise = ratio(row.times, AGAIN, "base")
        if value is not None:
            lines.append(f"{label} {name}: bar of {bar:g} of the base {way}: {'reached' if value <= bar else 'missed'} with {value:.3f} ({AGAIN}: {noise:.3f})")
    return lines


def sizes(given: argparse.Namespace) -> list[Size]:
    """The models that are asked for."""
    families = given.family.split(",")
    if given.tiny:
        return [size for size in TOYS if size.family in families]
    whole = {size.family: size for size in SIZES}
    level = partial(UNet2DConditionModel, sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320,), layers_per_block=1,
                    down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None, up_block_types=("CrossAttnUpBlock2D",))
    few = partial(FluxTransformer2DModel, num_layers=given.double, num_single_layers=given.single, guidance_embeds=True)
    found = []
    for family in families:
        size = replace(whole[family], side=(given.pixels or {"sd": 512, "flux": 1024}[family]) // 8)
        if family == "sd":
            size = replace(size, name=f"SD1.5's {'UNet' if given.whole else 'first level'}", **({} if given.whole else {"build": level}))
        else:
            size = replace(size, name=f"FLUX.1's width, {given.double} + {given.single} blocks", tokens=given.tokens, build=few)
        found.append(size)
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", default="sd,flux")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--counts", default="2,4")
    parser.add_argument("--pixels", type=int, help="side of the picture (512 for sd, 1024 for flux)")
    parser.add_argument("--tokens", type=int, default=512, help="of FLUX's prompt")
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="Stable Diffusion's whole UNet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tiny", action="store_true", help="toys in place of true widths: whether it works, and no figures")
    given = parser.parse_args(words)
    asked = given.methods.split(",")
    chosen = [name for name in asked if name in methods.all() or name.startswith("autolora-") and "autolora" in methods.all()]
    if len(chosen) < len(asked):
        print(f"skipped, for there are no such methods: {', '.join(name for name in asked if name not in chosen)}", flush=True)
    for size in sizes(given):
        model = Model(size, given.device, getattr(torch, given.dtype))
        print(f"{size.name}: {sum(part.numel() for part in model.denoiser.parameters()) / 1e6:.0f} million parameters, latents {size.side} x {size.side}, "
              f"{size.rows} row{'s' * (size.rows > 1)}, {size.tokens} tokens of text, {given.dtype} on {given.device}, {torch.get_num_threads()} threads, "
              f"{given.rounds} rounds", flush=True)
        for count in map(int, given.counts.split(",")):
            with TemporaryDirectory() as folder, torch.no_grad(), Bench(model, count, Path(folder)) as bench:
                for name in chosen:
                    label = f"{size.family}, K = {count},"
                    try:
                        print("\n".join(told(label, name, measured(bench, name, given.rounds))), flush=True)
                    except Refused as error:
                        print(f"{label} {name}: refused: {error}", flush=True)


if __name__ == "__main__":
    main()
