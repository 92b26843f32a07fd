"""One layer's adapters in rank space: y = W x + b + B (g * (A x)), for linear layers and convolutions.

All adapters of a layer are one stack of factors: `down` A (P, in, ...) and `up` B (out, P), P the sum of their ranks.
alpha/rank is folded into `up`; a weight is always a gate. Which form is computed follows from the gates:
one adapter in every row (its own slice), dense (two products whatever K is), one adapter per row (a row pays its own
rank and not P), token by token by masks, rank by rank by a `route` function that sees A x, or each adapter's output apart, for a
`combine` function. The factors may be rewritten for a while: whatever the gates are, they then act on other ones. Updates without small
exact factors stand beside them (`operators`).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from composition.adapters import rowwise
from composition.adapters.gates import Gates
from composition.adapters.operators import Operators
from composition.loop import Step
from composition.loras.kinds.base import Update, parted


class Product(NamedTuple):
    """A layer's factors as its activations need them. owner: the adapter of each rank; None: of ranks that are no adapter's, whose gate
    is 1 (rewritten ones, with the weights in them)."""

    down: Float[Tensor, "P in *kernel"]
    up: Float[Tensor, "out P"]
    owner: Int[Tensor, "P"] | None


Rewrite = Callable[[Product], Product]  # of single precision or better; as many ranks of the same owners, or ranks of no owner


# (the layer's stack, the step, A x of its input, the gate as the weights have it) -> the gate of every rank, as (P,) or by row and place
Route = Callable[["Stack", Step, Float[Tensor, "rows places P"], Float[Tensor, "P"]], Tensor]
# (the layer's stack, A x of its input)
Watch = Callable[["Stack", Float[Tensor, "rows places P"]], None]


class Stack:
    """A layer's updates and the gates that act on them.

    updates: of each adapter, None where it leaves this layer alone; they rest where they are, on the CPU and shared with whoever
    read them. One copy in the device and dtype of the activations is made when the first one passes, and another in its place when
    the activations are of another kind. axis: what the layer's tokens are, a key of the gates' places. path: the layer's.
    """

    def __init__(
        self, updates: Sequence[Update | None], gates: Gates, block: int, axis: Any = None, path: str = "",
    ) -> None:
        parts = [(None, ()) if update is None else parted(update) for update in updates]
        self._factors = tuple(factors for factors, _ in parts)
        self.operators = Operators([(k, update) for k, (_, rest) in enumerate(parts) for update in rest], gates, block, axis)
        self.gates, self.block, self.axis, self.path = gates, block, axis, path
        ends = list(accumulate(0 if part is None else part.rank for part in self._factors))
        self.spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
        self._product: Product | None = None
        self._rewrite: Rewrite | None = None
        self._slots: tuple[Int[Tensor, "K r"], Bool[Tensor, "K r"]] | None = None

    def touches(self, k: int) -> bool:
        """True when adapter k has ranks here."""
        return self.spans[k][0] < self.spans[k][1]

    def changes(self, k: int) -> bool:
        """True when adapter k changes this layer, by ranks or otherwise."""
        return self.touches(k) or self.operators.of(k)

    @property
    def ranked(self) -> bool:
        """True when any adapter has ranks here."""
        return self.spans[-1][1] > 0

    def size(self, k: int, weight: Tensor | None) -> float:
        """A bound of the length of adapter k's update at weight 1, and near it: the lengths of its factors multiplied, in float64. What has
        no factors counts beside the layer's own weight; without one, it counts nothing.
        """
        part, length = self._factors[k], 0.0
        if part is not None:
            down, up = (float(torch.linalg.vector_norm(factor.double())) for factor in (part.stored_down, part.stored_up))
            length = abs(part.scale) * down * up
        if weight is not None and self.operators.of(k):
            length += float(torch.linalg.vector_norm(self.operators.delta([float(k == n) for n in range(self.gates.count)], weight)))
        return length

    def prepare(self, module: nn.Module, like: Tensor) -> None:
        """Make whatever the first activations of the device and dtype of `like` would make."""
        self.gates.on(like.device)
        self.operators.prepare(module, like)
        if self.ranked:
            self.product(like)
            self._padded(like.device)

    def product(self, like: Tensor) -> Product:
        """The factors in the device and dtype of `like`."""
        held = self._product
        if held is None or held.down.dtype != like.dtype or held.down.device != like.device:
            self._product = self._slots = None  # the old copy goes before the new one comes
            held = self._product = self._built(like.device, like.dtype)
        return held

    def stored(self) -> Product:
        """The factors as their files have them, on the CPU, in float32 or better; nothing is kept."""
        dtype = torch.float64 if any(part is not None and part.dtype == torch.float64 for part in self._factors) else torch.float32
        return self._stacked(torch.device("cpu"), dtype)

    def rewrite(self, rewrite: Rewrite | None) -> None:
        """From now on the factors are what this makes of them; None: as they are."""
        self._rewrite, self._product = rewrite, None

    def ranks(self, module: nn.Module, x: Float[Tensor, "rows *in"], y: Float[Tensor, "rows *out"]) -> Float[Tensor, "rows places P"]:
        """A x of a layer's input, in the dtype of its output y; the places of a convolution are those of its output."""
        down = self.product(y).down
        if isinstance(module, nn.Conv2d):
            return _downward(module, x.to(y.device), down).flatten(2).transpose(1, 2)
        return F.linear(x.to(down), down).reshape(x.shape[0], -1, down.shape[0])

    def weights(self, y: Tensor, owner: Int[Tensor, "P"] | None) -> Float[Tensor, "rows P"]:
        """The gate of every rank as the adapters' weights have it, like y; one row where all are alike."""
        dense = self.gates.on(y.device).dense[:, self.block].to(y)
        return dense.new_ones(1, 1) if owner is None else dense.index_select(1, owner)

    def _built(self, device: torch.device, dtype: torch.dtype) -> Product:
        if self._rewrite is None:
            return self._stacked(device, dtype)
        down, up, owner = self._rewrite(self._stacked(device, torch.promote_types(dtype, torch.float32)))
        return Product(down.to(dtype), up.to(dtype), owner)

    def _stacked(self, device: torch.device, dtype: torch.dtype) -> Product:
        parts = [part for part in self._factors if part is not None]
        down = torch.cat([part.down.to(device, dtype) for part in parts])
        up = torch.cat([part.up.flatten(1).to(device, dtype) for part in parts], dim=1)
        return Product(down, up, self._owners(device))

    def _owners(self, device: torch.device) -> Int[Tensor, "P"]:
        # From numbers, and not by operations on a tensor of ranks: a compiler would not know the length, and break the graph here.
        return torch.tensor([k for k, (begin, end) in enumerate(self.spans) for _ in range(begin, end)], dtype=torch.long).to(device)

    def change(self, weights: Sequence[float], weight: Float[Tensor, "out *in"]) -> Float[Tensor, "out *in"]:
        """What a fold adds to the layer's own weight, where that is and in its dtype: of updates of every kind."""
        change = self.operators.delta(weights, weight) if self.operators.updates else 0.0
        return self.delta(weights, weight.device, weight.dtype).view(weight.shape) + change if self.ranked else torch.zeros_like(weight) + change

    def delta(self, weights: Sequence[float], device: torch.device, dtype: torch.dtype) -> Float[Tensor, "out in *kernel"]:
        """sum_k weight_k B_k A_k, computed there in `dtype`: of adapters with ranks. No copy of the factors stays."""
        gate = torch.tensor(weights, dtype=self.gates.factors.dtype) * self.gates.factors[self.block]
        down, up = self.constant(gate, device, dtype)
        flat = up @ down.flatten(1)
        return flat.view(up.shape[0], *down.shape[1:])

    def constant(self, gate: Float[Tensor, "K"], device: torch.device, dtype: torch.dtype) -> tuple[Float[Tensor, "P in *kernel"], Float[Tensor, "out P"]]:
        """The factors with these gates of the adapters in `up`: those of one LoRA that does the same. No copy of them stays."""
        down, up, owner = self._built(device, dtype)
        return down, up if owner is None else up * gate.to(device, dtype).index_select(0, owner)

    def each(self, like: Tensor, index: Int[Tensor, "runs"] | None) -> tuple[Float[Tensor, "runs r in *kernel"], Float[Tensor, "runs out r"]]:
        """The factors of adapters index[i], all padded to the largest rank; None: of every adapter in order.

        Equal ranks, the usual case, are views of the one copy.
        """
        down, up, _ = self.product(like)
        count, rank = len(self.spans), max(b - a for a, b in self.spans)
        if all(b - a == rank for a, b in self.spans):
            downs, ups = down.unflatten(0, (count, rank)), up.unflatten(1, (count, rank))
            if index is not None:
                downs, ups = downs.index_select(0, index), ups.index_select(1, index)
            return downs, ups.transpose(0, 1)
        slots, present = self._padded(down.device)
        if index is not None:
            slots, present = slots.index_select(0, index), present.index_select(0, index)
        downs = down.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        ups = up.index_select(1, slots.flatten()).unflatten(1, slots.shape).transpose(0, 1)
        return downs, ups * present[:, None]

    def _padded(self, device: torch.device) -> tuple[Int[Tensor, "K r"], Bool[Tensor, "K r"]]:
        """For adapters of different ranks: which rank of the stack each of the largest rank r of an adapter is, and whether it has it."""
        if self._slots is None:
            offset = torch.arange(max(b - a for a, b in self.spans))
            begin, end = (torch.tensor(side)[:, None] for side in zip(*self.spans, strict=True))
            present = begin + offset < end
            self._slots = torch.where(present, begin + offset, 0).to(device), present.to(device)
        return self._slots

    def __call__(self, module: nn.Module, x: Float[Tensor, "rows *in"], y: Float[Tensor, "rows *outs"]) -> Tensor:
        """The layer's output with its adapters, as the gates say, where y is. y may be written in place when no gradient needs it."""
        gates = self.gates
        if gates.mode in ("rows", "regional") or gates.mode == "dense" and gates.rows > 1:
            self._check(x, gates.places[self.axis].shape[0] if gates.mode == "regional" else gates.rows)
        if gates.mode == "combined":
            return self._combined(module, x, y)
        beside = self.operators(module, x, y) if self.operators.updates else None  # before y is written to
        out = self._with_ranks(module, x, y) if self.ranked else y
        return out if beside is None else out + beside

    def _with_ranks(self, module: nn.Module, x: Float[Tensor, "rows *in"], y: Float[Tensor, "rows *outs"]) -> Tensor:
        """y with what the adapters' factors add."""
        gates, conv = self.gates, isinstance(module, nn.Conv2d)
        if gates.mode == "one":
            if not self.touches(gates.only):
                return y
            return (_conv if conv else _linear)(module, x, y, *self._slice(y, gates.only))
        if gates.mode == "rows":
            # Copies: the buffers may be written before backward.
            down, up = self.each(y, None if gates.plain else gates.on(y.device).index.clone())
            scale = None if gates.even else gates.on(y.device).scale[:, self.block].to(down, copy=True)
            if isinstance(module, nn.Conv2d):
                return rowwise.conv(module, x.to(y.device), y, down, up, scale)
            return rowwise.linear(x.to(y.device), y, down, up, scale)
        if gates.mode == "dense":
            down, up, owner = self.product(y)
            return (_conv if conv else _linear)(module, x, y, down, up, self.weights(y, owner))
        if gates.mode == "regional":
            down, up, owner = self.product(y)
            assert owner is not None, "ranks without an owner have no place"
            gate = self._regional_gate(y, owner, conv)
            return (_conv_regional if conv else _linear_regional)(module, x, y, down, up, gate)
        assert gates.mode == "routed"
        return self._routed(module, x, y)

    def _combined(self, module: nn.Module, x: Float[Tensor, "rows *in"], y: Float[Tensor, "rows *outs"]) -> Tensor:
        """What `combine` makes of y and of each adapter's update."""
        gates = self.gates
        assert gates.combine is not None and gates.step is not None
        update = _conv_update if isinstance(module, nn.Conv2d) else _linear_update
        none = torch.zeros_like(y)
        each = [update(module, x, *self._slice(y, k)) if self.touches(k) else none for k in range(gates.count)]
        each = [part + self.operators.alone(module, x, y, k) if self.operators.of(k) else part for k, part in enumerate(each)]
        return gates.combine(self.path, gates.step, y, torch.stack(each))

    def _routed(self, module: nn.Module, x: Float[Tensor, "rows *in"], y: Float[Tensor, "rows *outs"]) -> Tensor:
        """Each rank's gate as `route` answers to A x."""
        assert self.gates.route is not None and self.gates.step is not None
        _, up, owner = self.product(y)
        h = self.ranks(module, x, y)
        h = h * self.gates.route(self, self.gates.step, h, self.weights(y, owner)[0]).to(h)
        if isinstance(module, nn.Conv2d):
            return y + torch.matmul(up, h.transpose(1, 2)).view_as(y)
        return _add(y, h.view(*y.shape[:-1], -1), up)

    def _regional_gate(self, like: Tensor, owner: Tensor, grid: bool) -> Tensor:
        """The gate of every rank at every place; layers of equal ranks, axis and block share it."""
        gates = self.gates
        key = (self.axis, self.block, self.spans, grid, like.dtype, like.device)
        if key not in gates.ready:
            place = gates.places[self.axis].to(like.device)
            weight = gates.on(like.device).dense[0, self.block].view(-1, *[1] * (place.ndim - 2))
            gate = (place * weight).to(like).index_select(1, owner)
            gates.ready[key] = gate if grid or gate.ndim == 2 else gate.flatten(2).transpose(1, 2).contiguous()
        return gates.ready[key]

    def _slice(self, y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """down, up and gate of adapter k alone."""
        a, b = self.spans[k]
        down, up, _ = self.product(y)
        gate = self.gates.on(y.device).dense[:, self.block, k : k + 1].to(y, copy=True)  # the buffer may be written before backward
        return down[a:b], up[:, a:b], gate

    def _check(self, x: Tensor, rows: int) -> None:
        if x.shape[0] != rows:
            raise RuntimeError(f"a layer got {x.shape[0]} rows while the gates were set for {rows}: gates set row by row "
                               "must match the denoiser's batch")


def _add(y: Tensor, h: Tensor, up: Tensor) -> Tensor:
    """y (rows, ..., out) + h (rows, ..., p) @ up (out, p)^T, in place where no gradient needs y and its memory allows."""
    if not y.is_contiguous() or torch.is_grad_enabled() and (h.requires_grad or y.requires_grad):
        return y + F.linear(h, up)
    return y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), up.T).view(y.shape)


def _ranks(x: Tensor, down: Tensor, gate: Tensor) -> Tensor:
    """g * (A x) of every row through the same factors; gate (rows or 1, p)."""
    return F.linear(x.to(down), down) * (gate if gate.shape[0] == 1 else gate.view(gate.shape[0], *[1] * (x.ndim - 2), -1))


def _linear(module: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    return _add(y, _ranks(x, down, gate), up)


def _linear_update(module: nn.Module, x: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    return F.linear(_ranks(x, down, gate), up)


def _linear_regional(module: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """Token by token; gate (rows, tokens, p), or (rows, p) for a layer whose rows have no place."""
    if x.ndim == gate.ndim and x.shape[1:-1] != gate.shape[1:-1]:
        raise RuntimeError(f"a layer got {x.shape[1]} tokens while its mask has {gate.shape[1]}")
    return _add(y, F.linear(x.to(down), down) * gate, up)


def _downward(module: nn.Module, x: Tensor, down: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    return F.conv2d(x.to(down), down, None, module.stride, module.padding, module.dilation, module.groups)


def _conv(module: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    return y + _conv_update(module, x, down, up, gate)


def _conv_update(module: nn.Module, x: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    return F.conv2d(_downward(module, x, down) * gate[..., None, None], up[..., None, None])


def _conv_regional(module: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """Place by place of the output's grid; gate (rows, p, h, w)."""
    if y.shape[-2:] != gate.shape[-2:]:
        raise RuntimeError(f"a layer has {y.shape[-2]} x {y.shape[-1]} places while its mask has {gate.shape[-2]} x {gate.shape[-1]}")
    return y + F.conv2d(_downward(module, x, down) * gate, up[..., None, None])
