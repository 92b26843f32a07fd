"""Gates: what multiplies a rank. One component's gates say which adapters are live, at what weight, in which rows or places."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from composition.loop import Step

Mode = Literal["off", "one", "dense", "rows", "regional", "routed", "combined"]
# (layer's path, the step, base output, each adapter's gated output) -> the layer's output
Combine = Callable[[str, Step, Float[Tensor, "rows *out"], Float[Tensor, "K rows *out"]], Float[Tensor, "rows *out"]]


class Values(NamedTuple):
    """The numbers of the gates, on one device.

    dense: the weight of each adapter in each row and block; one row where all are alike. index, scale: for one adapter per
    row, which it is and at what weight; equal neighbouring rows form one run.
    """

    dense: Float[Tensor, "rows blocks K"]
    index: Int[Tensor, "runs"]
    scale: Float[Tensor, "runs blocks"]


class Gates:
    """Read by every stack of the component.

    The values are written on the CPU. A device on which layers compute has buffers of the same values, made when its first layer
    asks and written in place from then on, so the gates follow the activations wherever the weights rest.
    """

    def __init__(self, factors: Float[Tensor, "blocks K"]) -> None:
        self.factors = factors  # what Lora.blocks says, per block, on the CPU
        self._ones = bool((factors == 1).all())
        self._written = 0  # how often the values were changed
        self._unfinished: set[int] = set()  # parts whose writing was interrupted, so that the devices may differ
        self.mode: Mode = "off"
        self.only = 0
        self.rows = 1
        self.runs: tuple[int, ...] = ()
        self.plain = False  # the runs are adapters 0..K-1 in order: no gather needed
        self.even = False  # every run's weight is 1 in every block: nothing to multiply by
        self.combine: Combine | None = None
        self.route: Callable[..., Tensor] | None = None
        self.step: Step | None = None  # for `combine` and `route`
        self.watch: Callable[..., object] | None = None  # sees every layer's ranks, whatever the gates are
        self.places: Mapping[Any, Float[Tensor, "rows K *place"]] = {}  # by a layer's axis
        self.ready: dict[Any, Tensor] = {}  # gates of ranks made of them, as layers need them
        self._buffers: dict[torch.device, list[Tensor]] = {torch.device("cpu"): [
            factors.new_zeros(1, *factors.shape), torch.zeros(1, dtype=torch.long), factors.new_zeros(1, factors.shape[0])]}

    @property
    def count(self) -> int:
        return self.factors.shape[1]

    def on(self, device: torch.device) -> Values:
        """The values on a device that computes."""
        if device not in self._buffers:
            self._buffers[device] = [_moved(value, device) for value in self._buffers[torch.device("cpu")]]
        dense, index, scale = self._buffers[device]
        return Values(dense[: self.rows], index[: len(self.runs)], scale[: len(self.runs)])

    @property
    def values(self) -> Values:
        """The values on the CPU."""
        return self.on(torch.device("cpu"))

    def off(self) -> None:
        self.mode = "off"

    def use(self, weights: Sequence[float]) -> None:
        """Every row alike: adapter k at weights[k]."""
        live = [k for k, weight in enumerate(weights) if weight != 0.0]
        if not live:
            self.mode = "off"
            return
        self._write_dense([weights])
        self.only = live[0]
        self.mode = "one" if len(live) == 1 else "dense"

    def per_row(self, weights: Sequence[Sequence[float]]) -> None:
        """Row i of the batch has adapter k at weights[i][k]."""
        live = [[k for k, weight in enumerate(row) if weight != 0.0] for row in weights]
        if not any(live):
            self.mode = "off"
            return
        if max(map(len, live)) > 1:
            self._write_dense(weights)
            self.mode = "dense"
            return
        only = [(row[0] if row else 0, weight[row[0]] if row else 0.0) for row, weight in zip(live, weights, strict=True)]
        runs = _even_runs(only)
        self.runs, self.rows = tuple(k for k, _ in runs), len(weights)
        self.plain, self.even = self.runs == tuple(range(self.count)), False
        index = torch.tensor(self.runs)
        weight = torch.tensor([w for _, w in runs], dtype=self.factors.dtype)
        self._write(None, index, weight[:, None] * self.factors.T[index])
        self.mode = "rows"

    def in_turn(self, size: int) -> None:
        """Adapter k alone, at weight 1, in rows k * size to (k + 1) * size: said without writing to the device.

        Raises ValueError when blocks have factors, which take a buffer.
        """
        if not self._ones:
            raise ValueError("adapters in turn are all at weight 1, in every block")
        self.runs, self.rows = tuple(range(self.count)), size * self.count
        self.plain = self.even = True
        self.mode = "rows"

    def _write_dense(self, weights: Sequence[Sequence[float]]) -> None:
        self.rows = len(weights)
        self._write(torch.tensor(weights, dtype=self.factors.dtype)[:, None, :] * self.factors, None, None)

    def _write(self, *values: Tensor | None) -> None:
        """Put dense, index and scale into the buffers of every device, in place as long as they fit; None stays as it is."""
        here = self._buffers[torch.device("cpu")]
        for part, value in enumerate(values):
            if value is None or part not in self._unfinished and len(value) <= len(here[part]) and torch.equal(here[part][: len(value)], value):
                continue  # the same as before: a device need not be written to
            self._written += 1
            self._unfinished.add(part)
            for device, buffers in self._buffers.items():
                if len(buffers[part]) < len(value):
                    buffers[part] = buffers[part].new_zeros(value.shape)
                # A copy out of pageable memory is staged before it returns; waiting for the device's queue is not needed.
                buffers[part][: len(value)].copy_(value, non_blocking=device.type == "cuda")
            self._unfinished.discard(part)

    def snapshot(self) -> tuple:
        """All of its state, values copied, for `restore`."""
        return (self.mode, self.only, self.rows, self.runs, self.plain, self.even, self.combine, self.route, self.step, self.watch,
                self.places, self.ready, self._written, tuple(value.clone() for value in self._buffers[torch.device("cpu")]))

    def restore(self, state: tuple) -> None:
        (self.mode, self.only, self.rows, self.runs, self.plain, self.even, self.combine, self.route, self.step, self.watch,
         self.places, self.ready, written, values) = state
        if written != self._written:
            self._write(*values)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    narrow = device.type == "mps" and value.dtype == torch.float64  # which mps does not have
    return value.to(device, torch.float32 if narrow else value.dtype, copy=True)


def _even_runs(rows: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Neighbouring equal rows as runs when all runs are equally long, else every row by itself."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]]
    lengths = {b - a for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)}
    return [rows[i] for i in starts] if len(lengths) == 1 else rows
