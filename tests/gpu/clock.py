"""Time and memory on a device: CUDA events where it is a GPU, the host's clock on a processor; medians after warm-up."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Marks:
    """Points in the device's own time; `spans` waits for the device and tells the seconds between neighbours."""

    def __init__(self, device: str | torch.device) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.points: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            self.points.append(torch.cuda.Event(enable_timing=True))
            self.points[-1].record()
        else:
            self.points.append(time.perf_counter())

    def spans(self) -> list[float]:
        pairs = zip(self.points, self.points[1:], strict=False)
        if not self.cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def timed(device: str | torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call from an idle device to an idle device, and its value."""
    settle(device)
    marks = Marks(device)
    marks.mark()
    value = call()
    marks.mark()
    return marks.spans()[0], value


def median(device: str | torch.device, call: Callable[[], Any], *, budget: float, most: int = 9) -> float:
    """Median seconds of a call: two to warm up (the second tells how many fit into `budget` seconds), then 3 to `most`."""
    call()
    second, _ = timed(device, call)
    marks = Marks(device)
    marks.mark()
    for _ in range(min(max(int(budget / max(second, 1e-6)), 3), most)):
        call()
        marks.mark()
    return statistics.median(marks.spans())


def settle(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def free(device: str | torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def allocated(device: str | torch.device) -> int:
    """Bytes of tensors on the device; 0 on a processor, where nobody counts them."""
    return torch.cuda.memory_allocated() if torch.device(device).type == "cuda" else 0


@contextmanager
def peak(device: str | torch.device, base: int = 0) -> Iterator[list[float]]:
    """A list that has, after the block, its peak memory on the device in MiB over `base` bytes; nothing on a processor."""
    peaks: list[float] = []
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield peaks
    if cuda:
        torch.cuda.synchronize()
        peaks.append((torch.cuda.max_memory_allocated() - base) / 2**20)
