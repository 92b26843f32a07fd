"""Part d: the trainer's steps a second on Pocket's UNet for 1, 4 and 16 adapters at once, 16 rows each.

Synthetic latents; rank 8 on attention, feed-forward and convolutions, as Medley trains Pocket. In float32 and with bfloat16 autocast.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from composition import Engine
from composition.training.concept import Concept, Plan, train
from tests.gpu import clock
from tests.gpu.chapter import Setting
from tests.gpu.report import Report
from tests.gpu.scene import there

COUNTS = (1, 4, 16)
ROWS = 16
WARM, MOST = 3, 30  # steps before the clock counts, and steps counted at most
TARGETS = ("attention", "feed_forward", "convolution")


def measure(setting: Setting, report: Report) -> None:
    setting.start(report)
    if not there("pocket"):
        report.remark("pocket is not in this copy of the repository")
        return
    rows = 2 if setting.tiny else ROWS
    report.remark(f"Pocket's UNet, {rows} rows for each adapter, rank 8; forward: the bare base's evaluation of as many rows")
    with Engine.open("pocket", device=setting.device, dtype="float32", offload="none") as engine:
        for half in (False, True) if setting.cuda else (False,):
            base: dict[int, float] = {}
            for count in (1, 2) if setting.tiny else COUNTS:
                what = f"K = {count}{', bf16 autocast' if half else ''}"
                report.attempt(what, _steps, setting, report, engine, what, count, rows, half, base)
                clock.free(setting.device)


def _steps(setting: Setting, report: Report, engine: Engine, row: str, count: int, rows: int, half: bool, base: dict[int, float]) -> None:
    """Train for some seconds and write the median step; `base` has the seconds by count of those before."""
    config = engine.backbone.denoiser.config
    shape = (64, config.in_channels, config.sample_size, config.sample_size)
    concepts = [Concept(f"c{k}", torch.randn(shape, generator=torch.Generator().manual_seed(k)), [f"a thing {k} {i % 8}" for i in range(64)])
                for k in range(count)]
    warm, most = (1, 2) if setting.tiny else (WARM, MOST)
    plan = Plan(rank=8, rate=1e-3, steps=1000, batch=rows, targets=TARGETS, half=half)
    marks, losses = clock.Marks(setting.device), []
    until = time.time() + max(min(report.left, 5.0), 1.0)

    def step(index: int, loss: dict[str, float]) -> None:
        losses.append(sum(loss.values()) / len(loss))
        if index >= warm:
            marks.mark()

    def enough() -> bool:
        return len(marks.points) > most or len(marks.points) > 2 and time.time() > until

    with TemporaryDirectory() as folder, clock.peak(setting.device, clock.allocated(setting.device)) as peak:
        train(engine.backbone, engine.adapters, concepts, plan, Path(folder), on_step=step, stop=enough)
    seconds = base[count] = statistics.median(marks.spans())
    forward = _forward(engine, count * rows, shape[1:], half, setting.budget)
    first = min(base)
    report.cell(row, {
        "steps/s": 1 / seconds, "ms a step": 1000 * seconds, f"over K = {first}": seconds / base[first], "adapter steps/s": count / seconds,
        "over forward": seconds / forward, "loss": losses[-1], **({"MiB": peak[0]} if peak else {})})


def _forward(engine: Engine, rows: int, shape: tuple[int, ...], half: bool, budget: float) -> float:
    """Seconds of the bare base's evaluation of as many rows, without gradients."""
    backbone = engine.backbone
    cond = backbone.encode(["a thing"], None)
    latents = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1)).to(backbone.device, backbone.dtype)
    t = torch.tensor(500, device=backbone.device)
    with torch.no_grad(), torch.autocast(backbone.device.type, torch.bfloat16, enabled=half):
        return clock.median(backbone.device, lambda: backbone.denoise(latents, t, cond), budget=budget, most=5)
