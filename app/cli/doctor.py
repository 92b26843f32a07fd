"""What this machine has and what of Medley will run on it."""

import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from app import settings
from app.engines import EngineOptions, open_engine, prepare
from composition import Lora, Refused, Request, __version__

_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "pydantic", "gradio", "typer", "rich", "pillow")


@dataclass
class Report:
    """Pairs of a name and a finding; healthy is False when something that ships with Medley does not run."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    healthy: bool = True

    def say(self, name: str, finding: str) -> None:
        self.lines.append((name, finding))

    def ill(self, name: str, finding: str) -> None:
        self.say(name, f"NOT WORKING: {finding}")
        self.healthy = False


def examine(place: EngineOptions) -> Report:
    """Versions, devices and memory; every bundled model is opened and makes one step with each of its LoRAs."""
    report = Report()
    report.say("medley", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        try:
            report.say(package, version(package))
        except PackageNotFoundError:
            report.ill(package, "not installed")
    prepare("pocket")
    try:
        _devices(report)
        _models(report, place)
    except ImportError as error:
        report.ill("imports", str(error))
    own = settings.lora_folder()
    count = len(list(own.rglob("*.safetensors"))) if own.is_dir() else 0
    report.say("your LoRAs", f"{own} ({count} files)" if own.is_dir() else f"{own} (not there yet)")
    return report


def _devices(report: Report) -> None:
    import torch

    cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if cuda else 0):
        free, total = torch.cuda.mem_get_info(index)
        report.say(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    if torch.backends.mps.is_available():
        report.say("mps", "Apple GPU")
    memory = ""
    if sys.platform != "win32" and hasattr(os, "sysconf"):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB of memory"
    report.say("cpu", f"{os.cpu_count()} cores{memory}")


def _models(report: Report, place: EngineOptions) -> None:
    from composition import methods
    from composition.bundled import BUNDLES

    for name in BUNDLES:
        try:
            with open_engine(name, place) as engine:
                names = [path.stem for path in engine.loras()]
                for source in names:
                    engine.run(Request(prompt="a picture", model=name, steps=1, loras=[Lora(source)], allow_partial=True))
                report.say(f"model {name}", f"{engine.family} on {engine.device}, {str(engine.dtype).removeprefix('torch.')}; "
                                            f"LoRAs {', '.join(names) or 'none'}")
        except (Refused, OSError, RuntimeError) as error:
            report.ill(f"model {name}", str(error).splitlines()[0] if str(error) else type(error).__name__)
    report.say("methods", ", ".join(methods.all()))
