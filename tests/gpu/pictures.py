"""Part a: every method on Pocket and Pocket-FLUX, the processor's float32 against the device's float32, bfloat16 and float16.

The processor's pictures are made by forked workers while the device makes its own. float32 on CUDA is without TF32, so that what
differs is the order of sums. Seconds are of one picture after a warm-up, loading left out.
"""

import functools
import multiprocessing
import os
import time
from typing import Any

import numpy as np
import torch

from composition import Engine, methods
from tests.gpu import clock
from tests.gpu.chapter import Setting
from tests.gpu.report import Report
from tests.gpu.scene import MODELS, request, there
from tests.reference import psnr

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HEAVY = ("clora", "w-composite", "clora-fast", "composite", "regions")  # first, so that no long one is begun last
ENOUGH = 40.0  # dB: float32 on another device may round otherwise, and that is all


@functools.cache
def _opened(model: str) -> Engine:
    return Engine.open(model, device="cpu", dtype="float32")


def _reference(model: str, method: str, steps: int, tiny: bool) -> tuple[np.ndarray, float]:
    """The processor's picture, and its seconds on one core."""
    engine = _opened(model)
    begun = time.perf_counter()
    image = engine.run(request(method, steps=steps, tiny=tiny)).images[0]
    return np.asarray(image), time.perf_counter() - begun


def _begin() -> None:
    """In a worker: one core, and no GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def _turn(method: str) -> int:
    return HEAVY.index(method) if method in HEAVY else len(HEAVY)


def measure(setting: Setting, report: Report) -> None:
    jobs = {model: list(methods.all()) for model in MODELS if there(model)}
    if setting.tiny and "pocket-flux" in jobs:
        jobs["pocket-flux"] = ["merge", "composite", "clora-fast"]
    cases = sorted(((model, name) for model, names in jobs.items() for name in names), key=lambda case: _turn(case[1]))
    workers = max(1, min((os.cpu_count() or 2) - 2, len(cases)))
    with multiprocessing.get_context("fork").Pool(workers, _begin) as pool:
        expected = {case: pool.apply_async(_reference, (*case, setting.steps, setting.tiny)) for case in cases}
        setting.start(report)
        report.remark(f"{setting.steps} steps; dB: the device's picture against the processor's float32, made meanwhile on one core each "
                      f"of {workers} at work" + ("; fp32 without TF32" if setting.cuda else ""))
        for model in MODELS:
            if model not in jobs:
                report.remark(f"{model} is not in this copy of the repository")
        for precision in PRECISIONS if setting.cuda else ("bf16",):
            for model, names in jobs.items():
                report.attempt(f"{model} in {precision}", _precision, setting, report, model, names, precision, expected)


def _precision(setting: Setting, report: Report, model: str, names: list[str], precision: str, expected: dict[tuple[str, str], Any]) -> None:
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    with Engine.open(model, device=setting.device, dtype=PRECISIONS[precision], offload="none") as engine:
        engine.run(request("merge", steps=2, tiny=setting.tiny))
        for name in names:
            report.attempt(f"{model} {name} in {precision}", _picture, setting, report, engine, name, precision, expected[model, name])
    clock.free(setting.device)


def _picture(setting: Setting, report: Report, engine: Engine, name: str, precision: str, expected: Any) -> None:
    seconds, result = clock.timed(setting.device, lambda: engine.run(request(name, steps=setting.steps, tiny=setting.tiny)))
    picture, slow = expected.get(timeout=max(report.left, 1.0))
    decibels = psnr(picture, result.images[0])
    row = f"{engine.name} {name}"
    report.cell(row, {"cpu s": slow, f"{precision} s": seconds, f"{precision} dB": _decibels(decibels)})
    if precision == "fp32":
        report.cell(row, {"cpu/fp32": slow / seconds})
        if decibels < ENOUGH:
            report.remark(f"LOW: {row} in fp32 is {decibels:.1f} dB from the processor's picture")


def _decibels(value: float) -> float | str:
    return "equal" if value == float("inf") else value
