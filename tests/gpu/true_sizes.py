"""Part b: one evaluation at true size with K LoRAs over the bare base's: stock PEFT, live, one-hot rows, folded; time and memory.

Random weights in bf16. One-hot rows are K times as many rows, so they are set against the bare base with as many. Memory is the peak over
the base's weights, LoRAs included. gap: how far the output is from stock PEFT's over its size, root mean squares; of one-hot rows, the
first LoRA's rows against that LoRA alone.
"""

import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from composition.adapters import Adapters
from composition.backbones.base import Backbone
from tests.gpu import clock
from tests.gpu.chapter import Setting
from tests.gpu.models import SIZES, TOYS, Model, Size, gap, one_hot, stock
from tests.gpu.report import Report

COUNTS = (1, 3, 8)


def measure(setting: Setting, report: Report) -> None:
    setting.start(report)
    if find_spec("peft") is None:
        report.remark("stock PEFT was not measured: peft is not installed")
    report.remark("MiB: peak over the base's weights; gap: from stock PEFT's output, over its size; LoRAs of rank 16 on attention, of "
                  "FLUX on its single blocks' feed-forward too")
    with torch.no_grad():
        for size in TOYS if setting.tiny else SIZES:
            report.attempt(size.name, _size, setting, report, size)
            clock.free(setting.device)


def _size(setting: Setting, report: Report, size: Size) -> None:
    with TemporaryDirectory() as folder:
        seconds, model = clock.timed(setting.device, lambda: Model(size, setting.device, torch.bfloat16))
        billions = sum(p.numel() for p in model.denoiser.parameters()) / 1e9
        report.remark(f"{size.name}: {billions:.3g} billion parameters, made in {seconds:.1f} s")
        trial = Trial(report, model, Path(folder), setting.budget)
        trial.bare(size.rows)
        for count in (1, 2) if setting.tiny else COUNTS:
            report.attempt(f"{size.name} K = {count}", trial.counted, count)
            clock.free(setting.device)


class Trial:
    """One model's measurements. budget: seconds for each. plain: the bare base's output and seconds by its number of rows."""

    def __init__(self, report: Report, model: Model, folder: Path, budget: float) -> None:
        self.report, self.model, self.folder, self.budget, self.rows = report, model, folder, budget, model.size.rows
        self.weights = clock.allocated(model.device)
        self.plain: dict[int, tuple[Tensor, float]] = {}

    def counted(self, count: int) -> None:
        """All arms with `count` LoRAs. What fails leaves the arms after it in place."""
        label, size, folder = f"K = {count}", self.model.size, self.folder
        loras = self.model.loras(folder, count)
        names = [name for name, _, _ in loras]
        weights = dict.fromkeys(names, 1.0)
        self.bare(count * self.rows)
        expected = self.report.attempt(f"{size.name} {label} stock PEFT", self._stock, label, loras) if find_spec("peft") else None
        clock.free(self.model.device)
        adapters = self.model.adapters()
        try:
            with adapters.session(loras):
                adapters.use({})
                self.arm(f"{label} none live", self.model.backbone, self.rows)
                adapters.use(weights)
                live = self.arm(f"{label} live", self.model.backbone, self.rows, expected)
                self.report.attempt(f"{size.name} {label} one-hot rows", self._rows, label, adapters, names)
                self.report.attempt(f"{size.name} {label} folded", self._folded, label, adapters, weights, live if expected is None else expected)
        finally:
            adapters.close()

    def bare(self, rows: int) -> None:
        if rows not in self.plain:
            self.arm(f"bare base, {rows} row{'s' * (rows > 1)}", self.model.backbone, rows)

    def _stock(self, label: str, loras) -> Tensor | None:
        twin = self.model.twin()
        begun = time.perf_counter()
        stock(twin.denoiser, self.model.size.component, loras)
        clock.settle(self.model.device)
        loading = time.perf_counter() - begun
        output = self.arm(f"{label} stock PEFT", twin, self.rows)
        self.report.cell(f"{self.model.size.name} {label} stock PEFT", {"set-up s": loading})
        return output

    def _rows(self, label: str, adapters: Adapters, names: list[str]) -> None:
        rows = len(names) * self.rows
        latents, t, cond = self.model.inputs(rows)
        adapters.use({names[0]: 1.0})
        alone = self.model.backbone.denoise(latents, t, cond.positive())[:, 0]
        with adapters.rows(one_hot(names[1:] + names[:1], self.rows)):  # the last rows are the first LoRA's
            self.arm(f"{label} one-hot rows", self.model.backbone, rows, alone)

    def _folded(self, label: str, adapters: Adapters, weights: dict[str, float], expected: Tensor | None) -> None:
        with ExitStack() as stack:
            seconds, _ = clock.timed(self.model.device, lambda: stack.enter_context(adapters.folded(weights)))
            adapters.use(weights)
            self.arm(f"{label} folded", self.model.backbone, self.rows, expected)
        self.report.cell(f"{self.model.size.name} {label} folded", {"set-up s": seconds})

    def arm(self, name: str, backbone: Backbone, rows: int, expected: Tensor | None = None) -> Tensor | None:
        """One row of the table; the output, (rows, C, H, W), None where it failed."""
        return self.report.attempt(f"{self.model.size.name} {name}", self._arm, name, backbone, rows, expected)

    def _arm(self, name: str, backbone: Backbone, rows: int, expected: Tensor | None) -> Tensor:
        device, inputs = self.model.device, self.model.inputs(rows)
        with clock.peak(device, self.weights) as peak:
            output = backbone.denoise(*inputs)[:, 0]
            seconds = clock.median(device, lambda: backbone.denoise(*inputs), budget=self.budget)
        plain, base = self.plain.setdefault(rows, (output, seconds))
        values = {"rows": rows, "ms": 1000 * seconds, "over bare": seconds / base, "MiB": peak[0] if peak else None}
        if output is not plain:
            values["change"] = gap(output, plain)
        if expected is not None:
            values["gap"] = gap(output[-len(expected) :], expected)
        self.report.cell(f"{self.model.size.name} {name}", values)
        if not output.isfinite().all():
            self.report.remark(f"{self.model.size.name} {name}: the output is not finite")
        return output

