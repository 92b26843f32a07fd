"""Part b: the same evaluation compiled once (torch.compile of the repeated blocks, as diffusers offers it): the bare base, and K live LoRAs.

The LoRAs' hooks are attached before anything is compiled. changed: from the compiled bare base's output to the compiled live one's; a hook that
the compiler does not see would leave it at 0. gap: from the same evaluation without compilation.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from composition.backbones.base import Backbone
from tests.gpu import clock
from tests.gpu.chapter import Setting
from tests.gpu.models import SIZES, TOYS, Model, Size, gap
from tests.gpu.report import Report

COUNT = 3


def measure(setting: Setting, report: Report) -> None:
    setting.start(report)
    report.remark("compiled block by block; first: seconds of the first evaluation, compilation included; graphs: how many were compiled")
    # The processor's compiler takes a minute for what is checked here: that the model with its hooks can be traced.
    backend = "eager" if setting.tiny else "inductor"
    with torch.no_grad():
        for size in TOYS if setting.tiny else (SIZES[0], SIZES[2], SIZES[1]):
            report.attempt(size.name, _size, setting, report, size, backend)
            torch.compiler.reset()
            clock.free(setting.device)


def _size(setting: Setting, report: Report, size: Size, backend: str) -> None:
    model = Model(size, setting.device, torch.bfloat16)
    twin = model.twin()
    bare, base = _arm(report, f"{size.name} bare base", model, twin, backend, None)
    del twin
    torch.compiler.reset()  # or the live one runs the code of the bare one: the compiler does not ask whether hooks are the same
    with TemporaryDirectory() as folder:
        loras = model.loras(Path(folder), COUNT)
        adapters = model.adapters()
        try:
            with adapters.session(loras):
                adapters.use({name: 1.0 for name, _, _ in loras})
                _arm(report, f"{size.name} K = {COUNT} live", model, model.backbone, backend, (bare, base))
        finally:
            adapters.close()


def _arm(
    report: Report, row: str, model: Model, backbone: Backbone, backend: str, plain: tuple[Tensor, float] | None,
) -> tuple[Tensor, float]:
    """One row of the table; the compiled output and its seconds. plain: those of the bare base."""
    inputs = model.inputs(model.size.rows)

    def evaluate() -> Tensor:
        return backbone.denoise(*inputs)

    expected = evaluate().clone()
    eager = clock.median(model.device, evaluate, most=9)
    torch._dynamo.utils.counters.clear()
    begun = time.perf_counter()
    backbone.denoiser.compile_repeated_blocks(backend=backend)
    output = evaluate().clone()
    clock.settle(model.device)
    first = time.perf_counter() - begun
    seconds = clock.median(model.device, evaluate, most=9)
    counters = torch._dynamo.utils.counters
    report.cell(row, {
        "eager ms": 1000 * eager, "ms": 1000 * seconds, "over eager": seconds / eager, "over bare": seconds / (plain[1] if plain else seconds),
        "first s": first, "graphs": counters["stats"].get("unique_graphs"), "breaks": sum(counters["graph_break"].values()),
        "gap": gap(output, expected), "changed": gap(output, plain[0]) if plain else None})
    return output, seconds
