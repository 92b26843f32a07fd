"""Trainings that take turns on one GPU, each in a process of its own: one gets ready while another trains, and each fails alone.

The processes are spawned, not forked: importing the libraries is enough for a forked one to be refused the GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .drawing import Shared

SPAWN = get_context("spawn")
STARTING, READY, TRAINING, TRAINED = range(4)
GRACE = 25.0  # seconds that a task may take to write its files when its turn is over
LAST = 12.0  # and when all time is over


class Turn:
    """A task's turn: it calls `minutes` when it is ready, which waits for the others, and `trained` afterwards."""

    def __init__(self, threads: int) -> None:
        self.threads, self.held = threads, Shared((2,), np.dtype(np.float64))

    @property
    def state(self) -> int:
        return int(self.held.array[0])

    def give(self, until: float) -> None:
        """Let it train until this moment."""
        self.held.array[1] = until

    def minutes(self) -> float:
        """Wait for the turn; how long it lasts."""
        self.held.array[0] = READY
        print(f"{time.strftime('%X')} ready", flush=True)
        while not self.held.array[1]:
            time.sleep(0.02)
        self.held.array[0] = TRAINING
        return max(0.0, self.held.array[1] - time.time()) / 60

    def trained(self) -> None:
        self.held.array[0] = TRAINED


class Task:
    """One training. ``run(turn, setting)`` is tried with one setting after another until it ends without an error."""

    def __init__(self, name: str, run: Callable[[Turn, Any], None], share: float, settings: Sequence[Any] = (None,),
                 after: Sequence[Task] = (), beside: bool = False) -> None:  # fmt: skip
        """share: of the time, relative to the others'. after: tasks that must have ended well. beside: train together with the one before."""
        self.name, self.run, self.share, self.settings, self.after, self.beside = name, run, share, list(settings), after, beside
        self.process: Any = None
        self.turn: Turn | None = None
        self.end = 0.0
        self.done = self.failed = False

    def start(self, log: Path, threads: int) -> None:
        """In a process of its own, whose output goes to the log."""
        self.turn, setting = Turn(threads), self.settings.pop(0)
        self.process = SPAWN.Process(target=_work, args=(self.run, self.turn, setting, log))
        self.process.start()
        print(f"{time.strftime('%X')} {self.name}: started{'' if setting is None else f' with {setting}'}", flush=True)

    def look(self, log: Path, threads: int) -> None:
        """Update the task from its process: done, failed, tried again with the next setting, or stopped when it is late."""
        if self.process is None or self.done or self.failed:
            return
        if self.process.is_alive():
            if self.end and time.time() > self.end + GRACE:
                print(f"{self.name}: stopped, as it was late", flush=True)
                self.stop()
                self.failed = True
            return
        if self.process.exitcode == 0:
            self.done = True
        elif self.settings:
            end = self.end
            self.start(log, threads)
            if end:  # its turn is not over
                self.turn.give(end)
        else:
            self.failed = True
        print(f"{time.strftime('%X')} {self.name}: {'done' if self.done else 'failed' if self.failed else 'once more'}", flush=True)

    def stop(self) -> None:
        """The process and all that it started."""
        if self.process is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()
            self.process.join()

    @property
    def state(self) -> int:
        return TRAINED if self.done or self.failed else self.turn.state if self.turn else STARTING


def _work(run: Callable[[Turn, Any], None], turn: Turn, setting: Any, log: Path) -> None:
    os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(turn.threads)
    try:
        run(turn, setting)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # whatever threads are left


def _next(turns: Sequence[Sequence[Task]], until: float) -> None:
    """Let the first turn train of those whose tasks are ready."""
    turn = next((turn for turn in turns if all(task.state >= READY for task in turn)), None)
    if turn is None:
        return
    end = time.time() + (until - time.time()) * turn[0].share / sum(other[0].share for other in turns)
    for task in turn:
        if task.state == READY:
            task.end = end
            task.turn.give(end)
            print(f"{time.strftime('%X')} {task.name}: trains for {end - time.time():.0f} s", flush=True)


def take_turns(tasks: Sequence[Task], until: float, logs: Path, *, threads: int, ahead: int = 2,
               tick: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    """Train all by the moment ``until``, each in its turn, or before it if another is not ready; LAST seconds later none is left.

    The remaining time is divided among the remaining tasks. ahead: turns that get ready meanwhile. tick: called now and then.
    """
    turns: list[list[Task]] = []
    for task in tasks:
        (turns[-1].append if task.beside and turns else turns.append)(task if task.beside and turns else [task])
    while turns and time.time() < until:
        flat = [task for turn in turns[: ahead + 1] for task in turn]
        for task in flat:
            if task.process is None and not task.failed:
                if any(earlier.failed for earlier in task.after):
                    print(f"{task.name}: left out, as {', '.join(earlier.name for earlier in task.after)} failed", flush=True)
                    task.failed = True
                elif all(earlier.done for earlier in task.after):
                    task.start(logs / f"{task.name}.log", threads)
        for task in tasks:
            task.look(logs / f"{task.name}.log", threads)
        turns = [turn for turn in turns if not all(task.state == TRAINED for task in turn)]
        if turns and not any(task.end and task.state != TRAINED for turn in turns for task in turn):
            _next(turns, until)
        tick()
        time.sleep(0.05)
    while any(task.process is not None and task.process.is_alive() for task in tasks) and time.time() < until + LAST:
        for task in tasks:
            task.look(logs / f"{task.name}.log", threads)
        tick()
        time.sleep(0.05)
    for task in tasks:
        task.look(logs / f"{task.name}.log", threads)  # it may have ended since
        task.stop()
