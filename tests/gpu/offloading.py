"""Part a: two LoRAs under every way of offloading, each against the same without: equal pictures.

Merge as it is used (its weights folded where they may be), then with gates alone, dense, row by row and place by place: the four ways in
which factors meet activations. In the number type that the device gets by itself.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from composition import Engine, Request
from tests.gpu import clock
from tests.gpu.chapter import Setting
from tests.gpu.report import Report
from tests.gpu.scene import MODELS, request, there
from tests.reference import psnr

WAYS = {"none": "none", "model": "model", "group": "group", "sequential": "sequential"}
PROCESSOR_WAYS = {"none": "none", "none again": "none"}  # a processor offloads nothing: the same twice
KINDS: Mapping[str, tuple[str, bool]] = {  # row to (method, folding allowed)
    "merge": ("merge", True), "merge live": ("merge", False), "composite": ("composite", False), "regions": ("regions", False)}


class Shot(NamedTuple):
    picture: np.ndarray
    seconds: float


def measure(setting: Setting, report: Report) -> None:
    setting.start(report)
    report.remark("two LoRAs; dB against the same picture without offloading")
    for model in MODELS:
        if not there(model):
            report.remark(f"{model} is not in this copy of the repository")
            continue
        whole: dict[str, Shot] = {}
        for way, offload in (WAYS if setting.cuda else PROCESSOR_WAYS).items():
            report.attempt(f"{model}, offload {way}", _way, setting, report, model, way, offload, whole)
            clock.free(setting.device)


def _way(setting: Setting, report: Report, model: str, way: str, offload: str, whole: dict[str, Shot]) -> None:
    """Every kind under one way. whole: by kind, what came of it without offloading, which the first way writes."""
    with Engine.open(model, device=setting.device, offload=offload) as engine:
        for kind, (method, fold) in KINDS.items():
            engine.fold = fold
            asked = request(method, count=2, steps=min(setting.steps, 4), tiny=setting.tiny)
            shot = report.attempt(f"{model} {kind}, offload {way}", _shot, setting, report, engine, asked, f"{model} {kind}", way)
            if shot is None:
                continue
            if way == "none":
                whole[kind] = shot
            elif kind in whole:
                plain = whole[kind]
                decibels = "equal" if (shot.picture == plain.picture).all() else psnr(plain.picture, shot.picture)
                report.cell(f"{model} {kind}", {f"{way}/none": shot.seconds / plain.seconds, f"{way} dB": decibels})


def _shot(setting: Setting, report: Report, engine: Engine, asked: Request, row: str, way: str) -> Shot:
    with clock.peak(setting.device) as peak:
        seconds, result = clock.timed(setting.device, lambda: engine.run(asked))
    report.cell(row, {f"{way} s": seconds, **({f"{way} MiB": peak[0]} if peak else {})})
    return Shot(np.asarray(result.images[0]), seconds)
