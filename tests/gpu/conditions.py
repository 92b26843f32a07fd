"""Part f: what conditions cost on FLUX.1's width, one and two of them: `tests.bench.easycontrol` on the device, in bfloat16."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from tests import toys
from tests.bench.easycontrol import Bench, measured
from tests.gpu import clock
from tests.gpu.chapter import Setting
from tests.gpu.report import Report

ROUNDS = 9
BLOCKS = (1, 2)  # double and single


def measure(setting: Setting, report: Report) -> None:
    setting.start(report)
    report.remark("one evaluation over the plain one: medians of the ratios within a round, and counted multiply-adds; gap: from the one pass")
    with torch.no_grad():
        for count in (1, 2):
            report.attempt(f"{count} conditions", _ways, setting, report, count)
            clock.free(setting.device)


def _ways(setting: Setting, report: Report, count: int) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"side": 16, "tokens": 24, "grid": 4, "rank": 2} if setting.tiny else {"side": 128, "tokens": 512, "grid": 32, "rank": 128}
    with torch.device(setting.device):
        transformer: Any = toys.flux_distilled(dtype=torch.float32).transformer if setting.tiny else FluxTransformer2DModel(
            num_layers=BLOCKS[0], num_single_layers=BLOCKS[1], guidance_embeds=True)
    transformer = transformer.to(setting.device, torch.float32 if setting.tiny else torch.bfloat16).eval().requires_grad_(False)
    bench = Bench(transformer, setting.device, count=count, **sizes)
    for way, values in measured(bench, 1 if setting.tiny else ROUNDS, lambda: report.left).items():
        seconds = values.pop("s")
        report.cell(f"{count} {way}", {"ms": 1000 * seconds, **values})
