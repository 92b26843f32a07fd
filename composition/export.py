"""Export: a set of LoRAs, as a static method has them, as one LoRA file that any tool reads.

The method runs for one evaluation, in which it measures what it must; what its layers have then is written: for Merge the factors of all
LoRAs side by side, with their weights in them, for SSR-Merge B diag(w) and R A, for others what they make of the factors. The
rank of a layer is the sum of the LoRAs' ranks there, or less by the nearest product of a given rank.
"""

import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from composition import methods
from composition.backbones import schedulers
from composition.backbones.encodings import Encodings
from composition.engine import Engine, always_on
from composition.loop import Step
from composition.loras import compact
from composition.loras.metadata import line
from composition.loras.writer import Written, write_ranked
from composition.methods import Method
from composition.refusal import Refused
from composition.request import ALWAYS_ON, Receipt, Request
from composition.run import Run
from composition.training.header import described
from composition.version import __version__


@dataclass(frozen=True)
class Exported:
    """A file that was written. ranks: rank to the number of layers that have it; components: the layers of each. kept: the share of the
    updates' energy that the ranks left, 1 where none was taken away. notes: the method's own."""

    file: Path
    ranks: Mapping[int, int]
    components: Mapping[str, int]
    kept: float
    receipts: tuple[Receipt, ...]
    notes: Mapping[str, Any]
    metadata: Mapping[str, str]


def export(
    engine: Engine, request: Request, file: Path, *, rank: int | None = None, dtype: torch.dtype = torch.float16, title: str = "",
    cancel: threading.Event | None = None,
) -> Exported:
    """Write what the request's method makes of its LoRAs as one LoRA.

    The prompt, size, steps and sampler matter to methods that measure something. rank: of a layer at most. dtype: of the file's numbers.
    Raises Refused for what is no one LoRA (a method that is not static, LoRAs that are on in some steps or places alone, conditions),
    where nothing is left, and for numbers that dtype cannot hold; Cancelled as `Engine.run`.
    """
    method = methods.find(request.method)
    options = method.read(request.options)
    check(request, method)
    request, _ = engine.settle(request.alone(0))
    check(request, method)  # tags of the prompt are LoRAs now
    loras = [(name, lora, engine.find(lora.source)) for name, lora in zip(request.names, request.loras, strict=True)]
    always = always_on(request, method)
    with engine.exclusive(), torch.no_grad(), engine.adapters.session(loras, allow_partial=request.allow_partial, always=always) as receipts:
        rows = list(zip(request.names, request.loras, receipts, strict=True))
        scheduler = schedulers.make(request.sampler, engine.backbone.scheduler, request.steps)
        run = Run(
            engine.backbone, engine.adapters, request, scheduler, [Generator().manual_seed(request.seed)], encodings=Encodings(), cancel=cancel,
            categories={name: lora.category or receipt.category for name, lora, receipt in rows},
            triggers={name: lora.triggers or receipt.triggers for name, lora, receipt in rows},
            always={name: lora for name, lora, _ in rows if name in always},
            tensors={name: receipt.tensor_sha256 for name, _, receipt in rows}, profiles=engine.profiles)
        latents, times = engine.backbone.start(request, scheduler, run.generators)
        first = Step(0, request.length, times[0], latents)
        if names := engine.adapters.unranked():
            raise Refused(f"{', '.join(names)} changes layers in a way that is no LoRA of a small rank (as LoKr, DoRA or a full difference does): leave it "
                          "out, and load it beside the file")
        try:
            with method.compose(run, options) as predict:
                predict(first)
                layers, kept = _layers(run, first, rank, dtype)
        finally:
            engine.backbone.release()
    if not layers:
        raise Refused("these LoRAs change nothing at their weights: there is nothing to export")
    plain = isinstance(run.notes.get(method.name), str)  # why it did nothing that Merge does not
    header = _header(engine, request, methods.find("merge") if plain else method, receipts, title)
    write_ranked(file, layers, header, kohya="unet" in engine.adapters.components)
    ranks, components = Counter(len(layer.down) for layer in layers), Counter(layer.component for layer in layers)
    return Exported(file, dict(sorted(ranks.items())), dict(components), kept, receipts, run.notes, header)


def check(request: Request, method: Method) -> None:
    """Raises Refused for what cannot be one LoRA."""
    if not method.static:
        able = ", ".join(name for name, each in methods.all().items() if each.static)
        raise Refused(f"method {method.name} is not one LoRA: what it does changes with the step, the place or the picture, or takes several "
                      f"evaluations a step; these can be exported: {able}")
    for name, lora in zip(request.names, request.loras, strict=True):
        if lora.scheduled:
            raise Refused(f"LoRA {name} is on from {lora.start:g} to {lora.end:g} of the steps: a LoRA file is on in all of them, so leave out start and end, and windows")
        if lora.region is not None:
            raise Refused(f"LoRA {name} has a region: a LoRA file acts on the whole picture, so leave out region")
    if not request.prompt.strip() and request.options.get("prompts", "trigger") in ("own", "request"):
        raise Refused(f"method {method.name} measures with the prompt here, and there is none: give one (CLI: --prompt), or leave out the option prompts")
    if request.anchored:
        raise Refused("anchored guidance is a way to draw a picture, and no part of a LoRA file: leave it out, and use it with the file")
    if request.conditions:
        raise Refused("conditions go with pictures, and are no part of a LoRA file: leave them out")


def _layers(run: Run, first: Step, rank: int | None, dtype: torch.dtype) -> tuple[list[Written], float]:
    """The layers as they are at this moment, ready to be written, and the share of their energy that is kept."""
    layers: list[Written] = []
    kept = whole = 0.0
    for component, path, down, up in run.adapters.constant(run.text_weights(run.live(first)), first.latents):
        down, up = compact.live(down.cpu(), up.cpu())
        if not len(down):
            continue
        if rank is not None:
            (down, up), mine, all_of_it = compact.truncated(down, up, rank)
            kept, whole = kept + mine, whole + all_of_it
        down, up = (factor.to(dtype) for factor in compact.even(down, up))
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise Refused(f"numbers of {component}.{path} are too large for {str(dtype).removeprefix('torch.')}: write the file in float32")
        layers.append(Written(component, path, down, up))
    return layers, kept / whole if whole else 1.0


def _header(engine: Engine, request: Request, method: Method, receipts: Sequence[Receipt], title: str) -> dict[str, str]:
    """What the library and other tools show of the file. It holds no path of the user's machine and no time."""
    rows = [(name, lora, receipt) for name, lora, receipt in zip(request.names, request.loras, receipts, strict=True) if name in request.active]
    title = line(title) or line(f"{' + '.join(receipt.title or name for name, _, receipt in rows)} ({method.title})")
    words = [word for _, lora, receipt in rows for word in lora.triggers or receipt.triggers]
    trigger = ", ".join(dict.fromkeys(words))
    categories: set[str] = {lora.category or receipt.category for _, lora, receipt in rows}
    if len(categories) > 1 and ALWAYS_ON in categories:  # with others it is no speed LoRA, whatever its title says
        categories = categories - {ALWAYS_ON, ""} or {"other"}
    sources = [{"name": name, "sha256": receipt.sha256, "weight": lora.weight}
               | ({} if lora.text_weight is None else {"text_weight": lora.text_weight}) | ({"blocks": dict(lora.blocks)} if lora.blocks else {})
               for name, lora, receipt in rows]
    fields = {
        **described(engine.backbone, engine.name, title=title, category=categories.pop() if len(categories) == 1 else "", trigger=trigger),
        "loras": json.dumps(sources, ensure_ascii=False), "method": method.name,
        "method_options": json.dumps(dict(request.options), sort_keys=True) if request.options else "", "software": f"medley {__version__}",
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value}
