"""One layer's adapters in rank space: y = W x + b + B (g * (A x)), for linear layers and convolutions.

All adapters of a layer are one stack of factors: `down` A (P, in, ...) and `up` B (out, P), P the sum of their ranks.
alpha/rank is folded into `up`; a weight is always a gate. Which form is computed follows from the gates:
one adapter in every row (its own slice), dense (two products whatever K is), one adapter per row (gathered: a row pays
its own rank and not P), token by token by masks, or each adapter's output apart, for a `combine` function.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from composition import rowwise

Mode = Literal["off", "one", "dense", "rows", "placed", "combined"]
# (base output, each adapter's gated output) -> the layer's output
Combine = Callable[[Float[Tensor, "rows *out"], Float[Tensor, "K rows *out"]], Float[Tensor, "rows *out"]]


class Gates:
    """One component's gates: small buffers written in place, read by every stack of the component.

    dense: (rows or 1, blocks, K), the weight of each adapter in each row and block, rows alike when it has one row.
    index (runs,), scale (runs, blocks): for one adapter per row; equal neighbouring rows form one run.
    """

    def __init__(self, factors: Float[Tensor, "blocks K"]) -> None:
        self.factors = factors  # what Lora.blocks says, per block
        self._known = factors.cpu()  # the same where it can be read without waiting for the device
        self._ones = bool((self._known == 1).all())
        self.mode: Mode = "off"
        self.only = 0
        self.rows = 1
        self.runs: tuple[int, ...] = ()
        self.plain = False  # the runs are adapters 0..K-1 in order: no gather needed
        self.even = False  # every run's weight is 1 in every block: nothing to multiply by
        self.combine: Combine | None = None
        self.places: Mapping[Any, Float[Tensor, "rows K *place"]] = {}  # by a layer's axis
        self.ready: dict[Any, Tensor] = {}  # gates made of them, as layers need them
        self._dense = factors.new_zeros(1, *factors.shape)
        self._index = torch.zeros(1, dtype=torch.long, device=factors.device)
        self._scale = factors.new_zeros(1, factors.shape[0])

    @property
    def count(self) -> int:
        return self.factors.shape[1]

    def known(self, block: int) -> Float[Tensor, "K"]:
        """What Lora.blocks says of a block, on the CPU."""
        return self._known[block]

    @property
    def dense(self) -> Float[Tensor, "rows blocks K"]:
        return self._dense[: self.rows]

    @property
    def index(self) -> Tensor:
        return self._index[: len(self.runs)]

    @property
    def scale(self) -> Float[Tensor, "runs blocks"]:
        return self._scale[: len(self.runs)]

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
        if self._index.shape[0] < len(runs):
            self._index = self._index.new_zeros(len(runs))
            self._scale = self._scale.new_zeros(len(runs), self.factors.shape[0])
        index = torch.tensor(self.runs)
        self.index.copy_(index)
        weight = torch.tensor([w for _, w in runs], dtype=self.factors.dtype)
        self.scale.copy_(weight[:, None] * self._known.T[index])
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
        if self._dense.shape[0] < self.rows:
            self._dense = self._dense.new_zeros(self.rows, *self.factors.shape)
        value = torch.tensor(weights, dtype=self.factors.dtype)[:, None, :] * self._known
        self.dense.copy_(value)

    def snapshot(self) -> tuple:
        """All of its state, values copied, for `restore`."""
        return (self.mode, self.only, self.rows, self.runs, self.plain, self.even, self.combine, self.places,
                self.ready, self._dense.clone(), self._index.clone(), self._scale.clone())

    def restore(self, state: tuple) -> None:
        (self.mode, self.only, self.rows, self.runs, self.plain, self.even, self.combine, self.places,
         self.ready, self._dense, self._index, self._scale) = state


def _even_runs(rows: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Neighbouring equal rows as runs when all runs are equally long, else every row by itself."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]]
    lengths = {b - a for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)}
    return [rows[i] for i in starts] if len(lengths) == 1 else rows


class Stack:
    """A layer's factors: down (P, in, *kernel), up (out, P), spans[k] the ranks of adapter k (empty: it has none).

    axis: what the layer's tokens are, a key of the gates' places.
    """

    def __init__(
        self, down: Tensor, up: Float[Tensor, "out P"], spans: Sequence[tuple[int, int]], gates: Gates, block: int,
        axis: Any = None,
    ) -> None:
        self.axis = axis
        self.down, self.up = down, up
        self.spans, self.gates, self.block = tuple(spans), gates, block
        self.owner = torch.cat([torch.full((b - a,), k) for k, (a, b) in enumerate(self.spans)]).to(down.device)
        self._cast: dict[str, tuple[Tensor, Tensor]] = {}

    def delta(self, weights: Sequence[float], dtype: torch.dtype) -> Float[Tensor, "out in *kernel"]:
        """sum_k weight_k B_k A_k, computed in `dtype` on the factors' device: what a fold adds to the weight."""
        gate = torch.tensor(weights, dtype=self.gates.factors.dtype) * self.gates.known(self.block)
        gate = gate.to(self.down.device, dtype).index_select(0, self.owner)
        flat = (self.up.to(dtype) * gate) @ self.down.to(dtype).flatten(1)
        return flat.view(self.up.shape[0], *self.down.shape[1:])

    def touches(self, k: int) -> bool:
        return self.spans[k][0] < self.spans[k][1]

    def _factors(self, like: Tensor, form: str) -> tuple[Tensor, Tensor]:
        """The factors in the activation's device and dtype; `form` "flat" as stored, "padded" as (K, r, in), (K, out, r)."""
        if self.down.requires_grad:
            return self._formed(self.down.to(like), self.up.to(like), form)
        kept = self._cast.get(form)
        if kept is None or kept[0].dtype != like.dtype or kept[0].device != like.device:
            kept = self._formed(self.down.to(like), self.up.to(like), form)
            self._cast[form] = kept
        return kept

    def _formed(self, down: Tensor, up: Tensor, form: str) -> tuple[Tensor, Tensor]:
        if form == "flat":
            return down, up
        rank = max(b - a for a, b in self.spans)
        downs = [F.pad(down[a:b].flatten(1), (0, 0, 0, rank - (b - a))) for a, b in self.spans]
        ups = [F.pad(up[:, a:b], (0, rank - (b - a))) for a, b in self.spans]
        return torch.stack(downs).view(len(downs), rank, *down.shape[1:]), torch.stack(ups)

    def __call__(self, module: nn.Module, x: Float[Tensor, "rows *in"], y: Float[Tensor, "rows *out"]) -> Tensor:
        """The layer's output with its adapters, as the gates say. y may be written in place when no gradient needs it."""
        gates = self.gates
        apply = _conv if isinstance(module, nn.Conv2d) else _linear
        if gates.mode == "one":
            if not self.touches(gates.only):
                return y
            return self._slice(apply, module, x, y, gates.only)
        if gates.mode == "rows":
            self._check(x, gates.rows)
            down, up = self._factors(y, "padded")
            if not gates.plain:
                down, up = down.index_select(0, gates.index), up.index_select(0, gates.index)
            # The buffer may be written before backward.
            scale = None if gates.even else gates.scale[:, self.block].to(down, copy=True)
            if isinstance(module, nn.Conv2d):
                return rowwise.conv(module, x, y, down, up, scale)
            return rowwise.linear(x, y, down, up, scale)
        if gates.mode == "dense":
            if gates.rows > 1:
                self._check(x, gates.rows)
            down, up = self._factors(y, "flat")
            gate = gates.dense[:, self.block].to(y).index_select(1, self.owner)
            return apply(module, x, y, down, up, gate)
        if gates.mode == "placed":
            self._check(x, gates.places[self.axis].shape[0])
            down, up = self._factors(y, "flat")
            gate = self._place(y, isinstance(module, nn.Conv2d))
            return (_conv_placed if isinstance(module, nn.Conv2d) else _linear_placed)(module, x, y, down, up, gate)
        assert gates.combine is not None
        still = torch.zeros_like(y)
        each = [self._slice(apply, module, x, still.clone(), k) if self.touches(k) else still for k in range(gates.count)]
        return gates.combine(y, torch.stack(each))

    def _place(self, like: Tensor, grid: bool) -> Tensor:
        """The gate of every rank at every place; layers of equal ranks, axis and block share it."""
        gates = self.gates
        key = (self.axis, self.block, self.spans, grid, like.dtype, like.device)
        if key not in gates.ready:
            place = gates.places[self.axis]
            weight = gates.dense[0, self.block].view(-1, *[1] * (place.ndim - 2))
            gate = (place * weight).to(like).index_select(1, self.owner)
            gates.ready[key] = gate if grid or gate.ndim == 2 else gate.flatten(2).transpose(1, 2).contiguous()
        return gates.ready[key]

    def _slice(self, apply: Callable[..., Tensor], module: nn.Module, x: Tensor, y: Tensor, k: int) -> Tensor:
        a, b = self.spans[k]
        down, up = self._factors(y, "flat")
        gate = self.gates.dense[:, self.block, k : k + 1].to(y, copy=True)  # the buffer may be written before backward
        return apply(module, x, y, down[a:b], up[:, a:b], gate)

    def _check(self, x: Tensor, rows: int) -> None:
        if x.shape[0] != rows:
            raise RuntimeError(f"a layer got {x.shape[0]} rows while the gates were set for {rows}: gates set row by row "
                               "must match the denoiser's batch")


def _add(y: Tensor, h: Tensor, up: Tensor) -> Tensor:
    """y (N, out) + h (N, p) @ up (out, p)^T, in place where no gradient needs y."""
    if torch.is_grad_enabled() and (h.requires_grad or y.requires_grad):
        return y + h @ up.T
    return y.addmm_(h, up.T)


def _linear(module: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """Every row through the same factors; gate (rows or 1, p)."""
    h = F.linear(x.to(down.dtype), down)
    h = h * (gate if gate.shape[0] == 1 else gate.view(gate.shape[0], *[1] * (x.ndim - 2), -1))
    if not y.is_contiguous():
        return y + F.linear(h, up)
    return _add(y.view(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), up).view(y.shape)


def _linear_placed(module: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """Token by token; gate (rows, tokens, p), or (rows, p) for a layer whose rows have no place."""
    if x.ndim == gate.ndim and x.shape[1:-1] != gate.shape[1:-1]:
        raise RuntimeError(f"a layer got {x.shape[1]} tokens while its mask has {gate.shape[1]}")
    return _add(y.view(-1, y.shape[-1]), (F.linear(x.to(down.dtype), down) * gate).view(-1, down.shape[0]), up).view(y.shape)


def _conv_placed(module: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """Place by place of the output's grid; gate (rows, p, h, w)."""
    assert isinstance(module, nn.Conv2d)
    if y.shape[-2:] != gate.shape[-2:]:
        raise RuntimeError(f"a layer has {y.shape[-2]} x {y.shape[-1]} places while its mask has {gate.shape[-2]} x {gate.shape[-1]}")
    return y + F.conv2d(_downward(module, x, down) * gate, up[..., None, None])


def _downward(conv: nn.Conv2d, x: Tensor, down: Tensor) -> Tensor:
    return F.conv2d(x, down, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _conv(module: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    h = _downward(module, x.to(down.dtype), down) * gate[..., None, None]
    return y + F.conv2d(h, up[..., None, None])
