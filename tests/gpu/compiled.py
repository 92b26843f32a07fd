"""Part b: the same evaluation compiled once (torch.compile of the repeated blocks, as diffusers offers it): the bare base, and K live LoRAs.

The LoRAs' hooks are attached before anything is compiled. changed: from the compiled bare base's output to the compiled live one's; a hook that
the compiler does not see would leave it at 0. gap: from the same evaluation without compilation.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

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
    plain: dict[str, tuple[Tensor, float]] = {}
    with torch.no_grad():
        for what, arm in (("bare base", _bare), (f"K = {COUNT} live", _live)):  # the bare bases first: they compile in less time
            for size in (TOYS[0], TOYS[2]) if setting.tiny else (SIZES[0], SIZES[2], SIZES[1]):
                report.attempt(f"{size.name} {what}", arm, setting, report, size, f"{size.name} {what}", backend, plain)
                # Or the live base would run the code of the bare one: the compiler does not ask whether the hooks are the same.
                torch.compiler.reset()
                clock.free(setting.device)


def _bare(setting: Setting, report: Report, size: Size, row: str, backend: str, plain: dict[str, tuple[Tensor, float]]) -> None:
    model = Model(size, setting.device, torch.bfloat16)
    plain[size.name] = _arm(report, row, model, backend, setting.budget, None)


def _live(setting: Setting, report: Report, size: Size, row: str, backend: str, plain: dict[str, tuple[Tensor, float]]) -> None:
    model = Model(size, setting.device, torch.bfloat16)
    with TemporaryDirectory() as folder:
        loras, adapters = model.loras(Path(folder), COUNT), model.adapters()
        try:
            with adapters.session(loras):
                adapters.use({name: 1.0 for name, _, _ in loras})
                _arm(report, row, model, backend, setting.budget, plain.get(size.name))
        finally:
            adapters.close()


def _arm(
    report: Report, row: str, model: Model, backend: str, budget: float, plain: tuple[Tensor, float] | None,
) -> tuple[Tensor, float]:
    """One row of the table; the compiled output and its seconds. plain: those of the bare base."""
    backbone, inputs = model.backbone, model.inputs(model.size.rows)

    def evaluate() -> Tensor:
        return backbone.denoise(*inputs)

    expected = evaluate().clone()
    eager = clock.median(model.device, evaluate, budget=budget)
    torch._dynamo.utils.counters.clear()
    begun = time.perf_counter()
    backbone.denoiser.compile_repeated_blocks(backend=backend)
    output = evaluate().clone()
    clock.settle(model.device)
    first = time.perf_counter() - begun
    seconds = clock.median(model.device, evaluate, budget=budget)
    counters, limit = torch._dynamo.utils.counters, torch._dynamo.config.recompile_limit
    graphs = counters["stats"].get("unique_graphs", 0)
    if graphs >= limit:
        report.remark(f"{row}: {graphs} graphs; from {limit} of a kind of block on the compiler gives up, and further blocks run as they are")
    report.cell(row, {
        "eager ms": 1000 * eager, "ms": 1000 * seconds, "over eager": seconds / eager, "over bare": seconds / plain[1] if plain else None,
        "first s": first, "graphs": graphs, "breaks": sum(counters["graph_break"].values()),
        "gap": gap(output, expected), "changed": gap(output, plain[0]) if plain else None})
    return output, seconds
