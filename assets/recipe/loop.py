"""The one training loop of the recipe: a budget in minutes, averaged weights, checkpoints it resumes from.

The learning rate is a function of the share of the budget that is spent, so a stage that was stopped, or that shares its
machine, still ends with its rate cooled down. The budget begins when one batch has gone both ways, so compiling is not in it. A
larger budget on a later call takes the training further. Started by torchrun, several processes share the gradient of their
batches; on a processor one process to a core is the fastest.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .muon import Muon

SYNC = 8  # steps after which the clock waits for a GPU, which would otherwise be queued more steps than it can do in time
Minutes = float | Callable[[], float]  # a budget, or a function that returns what is left of it once training can begin; it may block


def rate(spent: float, step: int, *, warm: int = 200, cool: float = 0.35) -> float:
    """Factor on the peak rate: linear warm-up over ``warm`` steps, then flat, then a cosine over the last share ``cool``."""
    start = min(1.0, (step + 1) / warm)
    end = max(0.0, min(1.0, (spent - (1 - cool)) / cool))
    return start * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * end)))


def joined() -> tuple[int, int]:
    """This process's number among those that train together, and how many they are; joins them when torchrun started it."""
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        torch.manual_seed(dist.get_rank())
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Loop:
    """Owns one stage's weights, their running average, the optimiser and the checkpoint."""

    def __init__(self, module: nn.Module, file: Path, *, minutes: Minutes, peak: float, cool: float = 0.35,
                 average: float = 0.999, decay: float = 0.01, save_every: float = 180.0,
                 hidden: Callable[[str], bool] | None = None):  # fmt: skip
        """hidden: the names of weights that Muon trains, at the same rate; the rest is AdamW's. None: all of it."""
        self.module, self.file, self.minutes, self.peak, self.cool = module, Path(file), minutes, peak, cool
        self.average, self.save_every = average, save_every
        self.weights = [p for p in module.parameters() if p.requires_grad]
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if hidden is not None and p.ndim > 1 and hidden(n)]
        outer = [p for n, p in named if hidden is None or p.ndim <= 1 or not hidden(n)]
        groups = [
            {"params": [p for p in outer if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in outer if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), fused=True)]
        if inner:
            self.optimisers.append(Muon(inner, peak, weight_decay=decay))
        self.rank, self.together = joined()
        self.step = self.seen = 0
        self.elapsed = 0.0
        self.smooth = [p.detach().clone() for p in self.weights]
        if self.file.is_file():
            self._load()
        if self.together > 1:
            for weight in self.weights:
                dist.broadcast(weight.data, 0)

    def _load(self) -> None:
        held = torch.load(self.file, map_location="cpu", weights_only=True)
        self.module.load_state_dict(held["module"])
        for optimiser, state in zip(self.optimisers, held["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.seen, self.elapsed = held["step"], held["seen"], held["elapsed"]
        for mine, saved in zip(self.smooth, held["smooth"], strict=True):
            mine.copy_(saved)

    @staticmethod
    def reached(file: Path) -> int:
        """How many pictures the checkpoint has seen, 0 when there is none."""
        return torch.load(file, map_location="cpu", weights_only=True)["seen"] if file.is_file() else 0

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        if self.rank:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        held = {"module": self.module.state_dict(), "optimisers": [o.state_dict() for o in self.optimisers], "smooth": self.smooth,
                "step": self.step, "seen": self.seen, "elapsed": self.elapsed}  # fmt: skip
        half = self.file.with_suffix(".part")
        torch.save(held, half)
        half.replace(self.file)

    def run(self, batches: Iterable, loss_of: Callable[..., torch.Tensor], report: Callable[[str], None] | None = None) -> None:
        """Train until the budget is spent. A batch is a tuple of tensors given to ``loss_of``; its first has length B."""
        batches = iter(batches)
        spent = not callable(self.minutes) and self.elapsed >= 60 * self.minutes
        seconds = self.elapsed if spent else self._begun(batches, loss_of)
        started, last_save, losses = time.monotonic() - self.elapsed, time.monotonic(), []
        while self.elapsed < seconds:
            for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
                group["lr"] = self.peak * rate(self.elapsed / seconds, self.step, cool=self.cool)
            batch = next(batches)
            loss = loss_of(*batch)
            loss.backward()
            self._share()
            nn.utils.clip_grad_norm_(self.weights, 1.0, foreach=True)
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()
            self.step, self.seen = self.step + 1, self.seen + len(batch[0]) * self.together
            keep = min(self.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.smooth, [p.detach() for p in self.weights], 1 - keep)
            if self.step % SYNC == 0 and loss.is_cuda:
                torch.cuda.synchronize()
            self.elapsed = self._agreed(time.monotonic() - started)
            losses.append(loss.detach())
            if self.step % 100 == 0:
                mean = torch.stack(losses).mean().item()
                if not math.isfinite(mean):
                    raise RuntimeError(f"the loss is {mean} at step {self.step}")
                if not self.rank:
                    (report or print)(f"{self.elapsed / 60:6.1f} min  step {self.step}  pictures {self.seen}  loss {mean:.4f}")
                losses = []
            if time.monotonic() - last_save > self.save_every:
                self.save()
                last_save = time.monotonic()
        self.save()

    def _begun(self, batches: Iterator, loss_of: Callable[..., torch.Tensor]) -> float:
        """One forward and backward pass without a step, so that whatever compiles or fails does so now. Returns the elapsed seconds at which training ends."""
        loss_of(*next(batches)).backward()
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        if self.weights[0].is_cuda:
            torch.cuda.synchronize()
        if not callable(self.minutes):
            return 60 * self.minutes
        seconds = 60 * self.minutes()
        self.save_every = min(self.save_every, seconds / 4)
        return self.elapsed + seconds

    @torch.no_grad()
    def _share(self) -> None:
        """The gradient of all processes' batches, in each of them."""
        if self.together == 1:
            return
        grads = [p.grad for p in self.weights if p.grad is not None]
        flat = _flatten_dense_tensors(grads)
        dist.all_reduce(flat)
        for grad, mean in zip(grads, _unflatten_dense_tensors(flat / self.together, grads), strict=True):
            grad.copy_(mean)

    def _agreed(self, elapsed: float) -> float:
        """Seconds by the slowest process's clock, so that all have one rate and end together."""
        if self.together == 1:
            return elapsed
        clock = torch.tensor(elapsed, device=self.weights[0].device)
        dist.all_reduce(clock, dist.ReduceOp.MAX)
        return float(clock)

    def averaged(self):
        """Context: the module holds the averaged weights inside, the trained ones again after."""
        return _Averaged(self)


class _Averaged:
    def __init__(self, loop: Loop):
        self.loop = loop

    def __enter__(self) -> nn.Module:
        self.kept = [p.detach().clone() for p in self.loop.weights]
        self._write(self.loop.smooth)
        return self.loop.module

    def __exit__(self, *_) -> None:
        self._write(self.kept)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self.loop.weights, values, strict=True):
            weight.copy_(value)
