"""Part e: quantised bases with two LoRAs, against the same base as it is: picture, seconds, and the peak of memory in use."""

from importlib.util import find_spec

import numpy as np

from composition import Engine
from composition.backbones.loading.quantize import KINDS
from tests.gpu import clock
from tests.gpu.chapter import Setting
from tests.gpu.report import Report
from tests.gpu.scene import MODELS, request, there
from tests.reference import psnr

ASKED = ("int8", "fp8", "nf4")
METHODS = ("merge", "composite")


def measure(setting: Setting, report: Report) -> None:
    setting.start(report)
    report.remark("two LoRAs in bf16; dB against the base that is not quantised")
    for model in MODELS[:1] if setting.tiny else MODELS:
        if not there(model):
            report.remark(f"{model} is not in this copy of the repository")
            continue
        plain: dict[str, tuple[np.ndarray, float]] = {}
        report.attempt(f"{model}, not quantised", _kind, setting, report, model, None, plain)
        for kind in ASKED:
            package, needs, _ = KINDS[kind]
            if find_spec(package) is None:
                report.remark(f"{kind} was not measured: {package} is not installed")
            elif needs and not setting.cuda:
                report.remark(f"{kind} was not measured: it needs a CUDA device")
            else:
                report.attempt(f"{model} {kind}", _kind, setting, report, model, kind, plain)
            clock.free(setting.device)


def _kind(setting: Setting, report: Report, model: str, kind: str | None, plain: dict[str, tuple[np.ndarray, float]]) -> None:
    with Engine.open(model, device=setting.device, dtype="bfloat16", offload="none", quantize=kind) as engine:
        for method in METHODS:
            asked = request(method, count=2, steps=setting.steps, tiny=setting.tiny)
            engine.run(request(method, count=2, steps=1, tiny=setting.tiny))
            with clock.peak(setting.device) as peak:
                seconds, result = clock.timed(setting.device, lambda asked=asked: engine.run(asked))
            picture = np.asarray(result.images[0])
            row, column = f"{model} {method}", kind or "plain"
            report.cell(row, {f"{column} s": seconds, **({f"{column} MiB": peak[0]} if peak else {})})
            if kind is None:
                plain[method] = picture, seconds
            elif method in plain:
                picture_plain, seconds_plain = plain[method]
                report.cell(row, {f"{column}/plain": seconds / seconds_plain, f"{column} dB": psnr(picture_plain, picture)})
