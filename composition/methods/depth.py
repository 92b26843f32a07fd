"""Depth: how many LoRAs act in a block follows its depth in the denoiser (after MoLA, arXiv 2402.08562).

MoLA trains LoRA experts and finds that deep layers deserve more of them than shallow ones (its inverted triangle). Here the experts are whole
LoRAs, nothing is trained, and the blocks are the denoiser's in the order in which they run. At the narrow end `least` LoRAs act, at the wide end
all. Which ones: those whose update is largest in that block over its own mean over all blocks, so that a loud LoRA does not take them all;
those that act have their weights. Layers outside the blocks have every LoRA. Constant, so it is folded.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from composition.adapters.stack import Product, Rewrite, Stack
from composition.loop import Predict, Step
from composition.methods import method
from composition.methods.shared.factors import adapters_of
from composition.methods.shared.static import added_up
from composition.run import Run

Shape = Literal["grows", "falls", "hourglass", "diamond"]
WIDTH: Mapping[str, Callable[[float], float]] = {  # of the depth from 0 to 1: 0 where fewest act, 1 where all do
    "grows": lambda depth: depth, "falls": lambda depth: 1 - depth, "hourglass": lambda depth: abs(2 * depth - 1),
    "diamond": lambda depth: 1 - abs(2 * depth - 1)}
ORDER = ("down", "double", "joint", "mid", "single", "up")  # kinds of blocks as they run


@dataclass(frozen=True)
class Options:
    shape: Shape = field(default="grows", metadata={"help":
        "How many LoRAs act: more with depth (grows), fewer (falls), fewest in the middle (hourglass) or most (diamond)."})
    least: int = field(default=1, metadata={"ge": 1, "le": 64, "help": "LoRAs that act where fewest do."})


@method(title="Depth", about="More LoRAs act in deep blocks than in shallow ones, each where it changes most.", paper="2402.08562", static=True, ranks="all")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    def rewriting(step: Step, live: tuple[str, ...]) -> dict[str, Rewrite]:
        names = dict(zip(adapters_of(run, live), live, strict=True))
        acting = allotted(_strengths(run, list(names)), blocks_of(run), options)
        if names:
            run.notes["depth"] = {block: [names[k] for k in here] for block, here in acting.items()}
        return {path: _only(layer, [k for k in names if k not in acting[block]]) for path, layer in run.adapters.stacks().items()
                if (block := run.backbone.block(path)) in acting and len(acting[block]) < len(names)}

    with added_up(run, rewriting) as predict:
        yield predict


def blocks_of(run: Run) -> list[str]:
    """The blocks of the denoiser in the order in which they run."""
    def place(block: str) -> tuple[int, int]:
        kind, _, number = block.partition(".")
        return ORDER.index(kind) if kind in ORDER else len(ORDER), int(number or 0)

    return sorted({run.backbone.block(path) for path, _ in run.backbone.denoiser.named_modules()} - {""}, key=place)


def allotted(strengths: Mapping[str, Mapping[int, float]], blocks: list[str], options: Options) -> dict[str, list[int]]:
    """The adapters that act in each block. strengths: of each adapter by block, over its mean over blocks; equal ones act together."""
    acting = {}
    for number, block in enumerate(blocks):
        mine = strengths.get(block, {})
        if mine:
            width = WIDTH[options.shape](number / (len(blocks) - 1) if len(blocks) > 1 else 1.0)
            least = min(options.least, len(mine))
            last = sorted(mine.values(), reverse=True)[least + int(width * (len(mine) - least) + 0.5) - 1]
            acting[block] = [k for k, strength in mine.items() if strength >= last * (1 - 1e-9)]
    return acting


def _strengths(run: Run, adapters: list[int]) -> dict[str, dict[int, float]]:
    """The root mean square of the updates of each adapter over the layers of a block, by block, over its mean over the blocks it touches."""
    squares: dict[str, dict[int, list[float]]] = {}
    for path, layer in run.adapters.stacks().items():
        if block := run.backbone.block(path):
            here, product = squares.setdefault(block, {k: [] for k in adapters}), layer.stored()
            for k in adapters:
                if layer.touches(k):
                    here[k].append(_square(layer, product, k))
    lengths = {block: {k: (sum(each) / len(each)) ** 0.5 if each else 0.0 for k, each in mine.items()} for block, mine in squares.items()}
    touched = {k: [mine[k] for mine in lengths.values() if mine[k] > 0] for k in adapters}
    return {block: {k: length * len(touched[k]) / sum(touched[k]) if length > 0 else 0.0 for k, length in mine.items()}
            for block, mine in lengths.items()}


def _square(layer: Stack, product: Product, k: int) -> float:
    """The squared length of B_k A_k, with the block's factor."""
    span = slice(*layer.spans[k])

    down, up = product.down.flatten(1)[span].double(), product.up[:, span].double()
    factor = float(layer.gates.factors[layer.block, k])
    return factor**2 * float(((down @ down.T) * (up.T @ up)).sum())


def _only(layer: Stack, silent: list[int]) -> Rewrite:
    """The factors without these adapters."""
    def rewrite(product: Product) -> Product:
        up = product.up.clone()
        for k in silent:
            up[:, slice(*layer.spans[k])] = 0.0
        return product._replace(up=up)

    return rewrite
