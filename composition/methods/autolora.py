"""AutoLoRA: LoRAs added up through gates that were learned for a base, for any LoRAs and any number of them (arXiv 2508.02107).

The gates are trained by `medley train gates` (`composition.training.gates`) and come with the bundled models. Of the published form
(kind "element") and two in rank space (`composition.methods.shared.gating`) whichever the file holds is used.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from composition import bundled
from composition.adapters.stack import Product, Rewrite
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import gating
from composition.methods.shared.static import Rewritten
from composition.refusal import Refused
from composition.run import Run

NOTED = 10  # steps whose gates are noted


@dataclass(frozen=True)
class Options:
    gates: str = field(default="", metadata={"help": "A file that `medley train gates` wrote for this model; empty: the bundled one."})


@method(title="AutoLoRA", about="Adds all LoRAs up, each scaled layer by layer through gates that were learned for this model.", paper="2508.02107", single=False, ranks="some")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    with torch.no_grad(), ExitStack() as stack:
        yield _Course(run, gates_of(run, options.gates), stack).predict


def gates_of(run: Run, file: str) -> gating.Gating | None:
    """The gates of this file, else the bundled ones; None for fewer than two LoRAs. Raises Refused where there are none for this model."""
    if len(run.names) < 2 and not file:
        return None
    own = bundled.BUNDLES[run.request.model].gates if run.request.model in bundled.BUNDLES else ""
    if not file and not own:
        raise Refused(f"no gates are bundled with {run.request.model}: train some with `medley train gates`, and name their file with option gates")
    path = Path(file) if file else bundled.path(own)
    gates = gating.read(path)
    check(gates, run, path)
    return gates


def check(gates: gating.Gating, run: Run, path: Path) -> None:
    """Raises Refused for gates of another base: of layers that this denoiser has not, or of another width."""
    for name, width in gates.design.layers.items():
        module = run.adapters.layer(name)
        mine = None if module is None else module.out_channels if isinstance(module, torch.nn.Conv2d) else module.out_features
        if mine != width:
            what = "does not have" if mine is None else f"has {mine} wide, not {width}"
            raise Refused(f"{path} has gates for {gates.design.base}, another base than {run.request.model}: of its {len(gates.design.layers)} layers this "
                          f"one {what} {name}. Train gates for this model with `medley train gates`")


class _Course:
    """One run: the gates, and what they were by layer and step, for the notes."""

    def __init__(self, run: Run, gates: gating.Gating | None, stack: ExitStack) -> None:
        self.run, self.gates = run, gates
        self.rewritten: Rewritten | None = None
        if gates is None:
            return
        self.categories = [run.categories.get(name, "") for name in run.adapters.names]
        if gates.design.base != run.request.model:
            run.notes["gates of"] = gates.design.base
        if gates.design.kind == "layer":
            self.rewritten = stack.enter_context(Rewritten(run, self._scaled))
        run.notes["autolora"] = {"kind": gates.design.kind, "steps": []}

    def predict(self, step: Step) -> Prediction:
        run, live = self.run, self.run.live(step)
        if self.gates is None or len(live) < 2 and self.gates.design.kind != "element" or not live:
            if self.rewritten is not None:
                self.rewritten.at(step)
            return Prediction(run.guide(run.denoise(step)), step.latents)
        if self.rewritten is not None:
            self.rewritten.folded(step)
            return Prediction(run.guide(run.denoise(step)), step.latents)
        means: dict[str, list[Tensor]] = {}

        def record(path: str, step: Step, mean: Tensor) -> None:
            means.setdefault(path, []).append(mean)

        seen = cast(gating.Seen, torch.compiler.disable(record))
        if self.gates.design.kind == "rank":
            rows = run.denoise(step, live, route=self.gates.route(self.categories, seen))
        else:
            weights = [live.get(name, 0.0) for name in run.adapters.names]

            known = self.gates

            @cache
            def bases(path: str) -> Tensor:
                layer = run.adapters.stacks().get(path)
                if layer is None:
                    return torch.zeros(known.design.layers[path], 0)
                return gating.directions(layer, torch.tensor([weights[k] for k, (a, b) in enumerate(layer.spans) for _ in range(a, b)]))

            rows = run.denoise(step, live, combine=self.gates.combine(bases, seen))
        if step.stage == 0 and step.index in noted(step.count):
            self._note(step, means)
        return Prediction(run.guide(rows), step.latents)

    def _scaled(self, step: Step, live: tuple[str, ...]) -> dict[str, Rewrite]:
        """The factors with each LoRA's up times its gate, by path; and the notes."""
        run, gates = self.run, self.gates
        assert gates is not None
        table: dict[str, Rewrite] = {}
        means: dict[str, list[Tensor]] = {}
        for path, layer in run.adapters.stacks().items():
            numbers = [run.adapters.names.index(name) for name in live if layer.touches(run.adapters.names.index(name))]
            if path not in gates.places or len(numbers) < 2:
                continue
            kinds = torch.tensor([gating.number(self.categories[k]) for k in numbers])
            constant = gates.constant(path, kinds)
            means[path] = [constant]
            table[path] = _scaling(torch.ones(len(layer.spans)).to(constant).index_copy(0, torch.tensor(numbers, device=constant.device), constant))
        self._note(step, means)
        return table

    def _note(self, step: Step, means: dict[str, list[Tensor]]) -> None:
        """The mean gate of each live LoRA in each layer, rounded; layers in which one was alone are left out."""
        self.run.notes["autolora"]["steps"].append({
            "step": step.index, "loras": list(self.run.live(step)),
            "gates": {path: [round(value, 3) for value in values[0].float().cpu().tolist()] for path, values in means.items()}})


def noted(count: int) -> set[int]:
    """The steps of so many whose gates go into the notes: ten at most, evenly, the first and the last among them."""
    return {round(turn * (count - 1) / (NOTED - 1)) for turn in range(NOTED)}


def _scaling(factor: Tensor) -> Rewrite:
    """factor: (K,), of every adapter."""

    def rewrite(product: Product) -> Product:
        assert product.owner is not None
        return product._replace(up=product.up * factor.to(product.up).index_select(0, product.owner))

    return rewrite
