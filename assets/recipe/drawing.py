"""Pictures drawn ahead of the training: chunks of rows that worker processes put into shared memory, and a pool on the device.

A row is one scene: its picture and, as numbers, its labels. Without workers a chunk is drawn when it is needed;
the rows are the same.
"""

from __future__ import annotations

import mmap
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

Rows = tuple[np.ndarray, ...]
FORK = get_context("fork")
FREE, BEGUN, READY = 0, 1, 2  # a slot of a stock
NEXT, FAILED = -2, -1  # beside the slots: the chunk to be drawn next, and whether drawing one failed
SEEN = 4  # times that a row of a pool is used by default
MANY = 16  # batches' rows that a pool has before the first is drawn from it


class Shared:
    """An array of zeros that this process shares with those forked from it and those it is sent to, while this one lives."""

    def __init__(self, shape: tuple[int, ...], kind: np.dtype) -> None:
        self.shape, self.kind, size = shape, np.dtype(kind), max(1, int(np.prod(shape)) * np.dtype(kind).itemsize)
        self.file = os.memfd_create("rows") if hasattr(os, "memfd_create") else -1  # without files, for forked processes alone
        if self.file >= 0:
            os.ftruncate(self.file, size)
        self.where = f"/proc/{os.getpid()}/fd/{self.file}"
        self.array = self._mapped(mmap.mmap(self.file, size))

    @classmethod
    def of(cls, array: np.ndarray) -> Shared:
        shared = cls(array.shape, array.dtype)
        shared.array[...] = array
        return shared

    def _mapped(self, memory: mmap.mmap) -> np.ndarray:
        return np.frombuffer(memory, dtype=self.kind, count=int(np.prod(self.shape))).reshape(self.shape)

    def __getstate__(self) -> tuple[tuple[int, ...], np.dtype, str]:
        return self.shape, self.kind, self.where

    def __setstate__(self, state: tuple[tuple[int, ...], np.dtype, str]) -> None:
        self.shape, self.kind, self.where = state
        with open(self.where, "r+b") as file:
            self.array = self._mapped(mmap.mmap(file.fileno(), 0))


def each(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> list[Any]:
    """The function's result for each item, in order, computed in ``workers`` forked processes."""
    if workers < 2 or len(items) < 2:
        return [function(item) for item in items]
    done = FORK.SimpleQueue()

    def work(first: int) -> None:
        torch.set_num_threads(1)
        for i in range(first, len(items), workers):
            try:
                done.put((i, function(items[i]), None))
            except Exception as error:  # raised where the results are collected
                done.put((i, None, error))

    crew = [FORK.Process(target=work, args=(i,), daemon=True) for i in range(min(workers, len(items)))]
    for process in crew:
        process.start()
    results: dict[int, Any] = {}
    for _ in items:
        number, result, error = done.get()
        if error is not None:
            raise error
        results[number] = result
    for process in crew:
        process.join()
    return [results[i] for i in range(len(items))]


class Stock:
    """Chunks of rows, read in order: ``draw(first, count)`` gives arrays of that length for the scenes from that number on."""

    def __init__(self, draw: Callable[[int, int], Rows], *, first: int = 0, chunk: int = 64, chunks: int | None = None, slots: int = 32):
        """chunks: how many there are, None without end. slots: how many are kept until they are read; chunks at most."""
        self.draw, self.first, self.chunk, self.chunks = draw, first, chunk, chunks
        self.slots = slots if chunks is None else min(slots, chunks)
        self.taken = 0
        self.rows: tuple[Shared, ...] = ()

    def share(self) -> None:
        """Make room that other processes can write to; then the stock can also be sent to one that reads it."""
        row = self.draw(self.first, 1)
        self.rows = tuple(Shared((self.slots * self.chunk, *array.shape[1:]), array.dtype) for array in row)
        self.states, self.lock = Shared((self.slots + 2,), np.dtype(np.int64)), FORK.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("draw", "lock")}

    @property
    def drawn(self) -> int:
        """Chunks that workers have begun."""
        return int(self.states.array[NEXT]) if self.rows else self.taken

    def fill(self) -> int:
        """In a worker: draw the next chunk. READY when one was drawn, BEGUN when there is no room yet, FREE when none is left."""
        states = self.states.array
        with self.lock:
            number = int(states[NEXT])
            if self.chunks is not None and number >= self.chunks:
                return FREE
            slot = number % self.slots
            if states[slot] != FREE:
                return BEGUN
            states[slot], states[NEXT] = BEGUN, number + 1
        try:
            for held, array in zip(self.rows, self.draw(self.first + number * self.chunk, self.chunk), strict=True):
                held.array[slot * self.chunk : (slot + 1) * self.chunk] = array
        except Exception:
            traceback.print_exc()  # before the others hear of it: they stop this process
            states[FAILED] = 1
            raise
        states[slot] = READY
        return READY

    def take(self, device: torch.device) -> tuple[torch.Tensor, ...] | None:
        """The next chunk on the device; None when it is not drawn yet, or none is left."""
        if self.chunks is not None and self.taken >= self.chunks:
            return None
        if not self.rows:
            drawn = self.draw(self.first + self.taken * self.chunk, self.chunk)
            self.taken += 1
            return tuple(torch.from_numpy(array).to(device) for array in drawn)
        slot, states = self.taken % self.slots, self.states.array
        if states[FAILED]:
            raise RuntimeError("a process that draws scenes stopped; its error is printed above")
        if states[slot] != READY:
            return None
        part = slice(slot * self.chunk, (slot + 1) * self.chunk)
        taken = tuple(torch.from_numpy(shared.array[part]).to(device, copy=True) for shared in self.rows)
        self.taken += 1
        if self.slots != self.chunks:
            states[slot] = FREE
        return taken


@contextmanager
def drawn_ahead(stocks: Sequence[Stock], workers: int) -> Iterator[None]:
    """Context: ``workers`` processes fill the stocks, the first stock first. Enter it before anything is put on a GPU."""
    if not workers:
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for stock in stocks:
        stock.share()
    crew = [FORK.Process(target=_work, args=(stocks,), daemon=True) for _ in range(workers)]
    for process in crew:
        process.start()
    try:
        yield
    finally:
        for process in crew:
            process.terminate()
        for process in crew:
            process.join()


def _work(stocks: Sequence[Stock]) -> None:
    torch.set_num_threads(1)
    os.nice(5)
    try:
        while state := _first(stocks):
            if state == BEGUN:
                time.sleep(0.02)
    except Exception:
        return  # printed where it was raised


def _first(stocks: Sequence[Stock]) -> int:
    """Draw for the first stock that has room. READY, BEGUN when all that are left are full, FREE when none is left."""
    full = FREE
    for stock in stocks:
        state = stock.fill()
        if state == READY:
            return READY
        full = max(full, state)
    return full


class Pool:
    """Rows on the device; the oldest give way to new ones. Batches are drawn at random."""

    def __init__(self, stock: Stock, device: torch.device, *, limit: int = 98_304,
                 enter: Callable[..., tuple[torch.Tensor, ...]] | None = None, seen: float = SEEN):  # fmt: skip
        """enter: what is kept of a chunk's rows, the rows themselves when None. seen: times that a row is used before a new one comes."""
        self.stock, self.device, self.enter, self.seen = stock, device, enter, seen
        self.limit = max(1, limit // stock.chunk) * stock.chunk
        self.rows: tuple[torch.Tensor, ...] = ()
        self.count = 0  # rows ever entered

    @torch.no_grad()
    def add(self) -> bool:
        """Enter one chunk, if there is one."""
        taken = self.stock.take(self.device)
        if taken is None:
            return False
        if self.enter:
            taken = self.enter(*taken)
        if not self.rows:
            self.rows = tuple(torch.empty((self.limit, *rows.shape[1:]), dtype=rows.dtype, device=self.device) for rows in taken)
        at = self.count % self.limit
        for held, rows in zip(self.rows, taken, strict=True):
            held[at : at + len(rows)] = rows
        self.count += self.stock.chunk
        return True

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Endless batches of ``size`` rows."""
        least = min(MANY * size, self.limit)
        used = 0
        while self.count < least:
            if not self.add():
                if self.stock.taken == self.stock.chunks and self.count:
                    break
                time.sleep(0.02)
        while True:
            if self.count < least + used / self.seen:
                self.add()
            pick = torch.randint(min(self.count, self.limit), (size,), device=self.device)
            yield tuple(rows[pick] for rows in self.rows)
            used += size
