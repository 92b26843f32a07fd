"""What a chapter has measured so far, written to its file after every number, and how it fails: one measurement at a time.

Only the standard library at the top, for the command reads these files without loading torch.
"""

import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")


class Broken(RuntimeError):
    """The device answers nothing any more: no measurement after this one can be had in this process."""


class Report:
    """Rows of a table by label, remarks, and what failed. until: the time (of `time.time`) after which nothing new begins."""

    def __init__(self, file: Path, until: float, device: str = "cpu") -> None:
        self.file, self.until, self.device = file, until, device
        self.content: dict[str, Any] = {"machine": {}, "rows": {}, "remarks": [], "errors": [], "skipped": [], "finished": False}
        self.begun = time.time()

    def cell(self, row: str, values: Mapping[str, Any]) -> None:
        """Add these columns to a row. A number that is none (inf, nan) is written as a word: JSON knows no such number."""
        plain = {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
        self.content["rows"].setdefault(row, {}).update(plain)
        self.save()

    def remark(self, text: str) -> None:
        if text not in self.content["remarks"]:
            self.content["remarks"].append(text)
            self.save()

    def attempt(self, what: str, call: Callable[..., Value], *args: Any, **kwargs: Any) -> Value | None:
        """The call's value; None where it failed, which is recorded, or where the time is up. Raises Broken with a lost device."""
        if self.left <= 0:
            self.content["skipped"].append(what)
            self.save()
            return None
        try:
            return call(*args, **kwargs)
        except Broken:
            raise
        except Exception as error:  # whatever went wrong: the next measurement does not depend on it
            self.failed(what, error)
        self._recover(what)
        return None

    def failed(self, what: str, error: BaseException) -> None:
        lines = traceback.format_exception(error)
        last = " ".join(lines[-1].split())
        self.content["errors"].append({"what": what, "error": last[:400], "traceback": "".join(lines)[-4000:]})
        self.save()

    def _recover(self, what: str) -> None:
        """Free what the failed measurement held. A CUDA error that outlives its cause shows at the next synchronisation."""
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is None or not self.device.startswith("cuda"):
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise Broken(f"the device is lost after {what}: {' '.join(str(error).split())[:200]}") from error

    @property
    def left(self) -> float:
        """Seconds until nothing new begins."""
        return self.until - time.time()

    def save(self) -> None:
        self.content["seconds"] = round(time.time() - self.begun, 1)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1, allow_nan=False), encoding="utf-8")
        part.replace(self.file)


def read(file: Path) -> dict[str, Any]:
    """What a chapter had written by now; {} before its first word."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
