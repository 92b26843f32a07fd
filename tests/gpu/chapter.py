"""One chapter of the measurement in this process: `python -m tests.gpu.chapter MODULE --file FILE --until TIME [--device cuda] [--tiny]`.

`python -m tests.gpu` starts it. The module of this package has `measure(setting, report)`, which calls `setting.start` before it touches the device.
"""

import argparse
import importlib
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.gpu.report import Report

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "torchao", "bitsandbytes")


@dataclass(frozen=True)
class Setting:
    """device: "cuda" or "cpu". tiny: little enough for a processor in seconds. steps: of a picture."""

    device: str
    tiny: bool
    steps: int

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def budget(self) -> float:
        """Seconds that `clock.median` may spend on one number."""
        return 0.0 if self.tiny else 1.5

    def start(self, report: Report) -> None:
        """Start the device and write what it is. Workers must be forked before: a started CUDA does not survive a fork."""
        report.content["machine"] = machine(self.device)
        report.save()


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on. On CUDA this starts the device."""
    import torch

    facts: dict[str, Any] = {"device": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(0)
        facts |= {"device": card.name, "GiB": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("module")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    report = Report(asked.file, asked.until, asked.device)
    report.save()
    try:
        importlib.import_module(f"tests.gpu.{asked.module}").measure(Setting(asked.device, asked.tiny, asked.steps), report)
    except Exception as error:  # the command tells it in its table; the other chapters are processes of their own
        report.failed(asked.module, error)
        return 1
    report.content["finished"] = not report.content["skipped"]
    report.save()
    return 1 if report.content["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
