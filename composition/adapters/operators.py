"""One layer's updates of kinds without small exact factors: each a product of its own, gated as factors are.

What they add is computed from the layer's input and from its output before any adapter; the gate of an adapter multiplies the whole. Of
gates rank by rank they see the adapter's weight alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composition.adapters.gates import Gates
from composition.loras.kinds.base import Forward, Update


class Operators:
    """updates: the number of the adapter and one of its updates of this layer, as often as there are some."""

    def __init__(self, updates: Sequence[tuple[int, Update]], gates: Gates, block: int, axis: Any = None) -> None:
        self.updates, self.gates, self.block, self.axis = tuple(updates), gates, block, axis
        self._ready: tuple[torch.dtype, torch.device, tuple[Forward, ...]] | None = None

    def of(self, k: int) -> bool:
        """True when adapter k has one here."""
        return any(owner == k for owner, _ in self.updates)

    @property
    def shifting(self) -> bool:
        """True when one of them changes the bias."""
        return any(update.shift(torch.empty(0)) is not None for _, update in self.updates)

    def prepare(self, layer: nn.Module, like: Tensor) -> tuple[Forward, ...]:
        """What they are for activations in the device and dtype of `like`: made when the first ones pass, and anew for others."""
        if self._ready is None or self._ready[:2] != (like.dtype, like.device):
            self._ready = None  # the old copies go before the new ones come
            with torch.no_grad():
                self._ready = like.dtype, like.device, tuple(update.forward(layer, like) for _, update in self.updates)
        return self._ready[2]

    def delta(self, weights: Sequence[float], weight: Float[Tensor, "out *in"]) -> Float[Tensor, "out *in"]:
        """What these weights make of a layer's weight, less that weight."""
        total = torch.zeros_like(weight)
        for (_, update), gate in zip(self.updates, self._constant(weights), strict=True):
            if gate:
                total += gate * update.delta(weight)
        return total

    def shift(self, weights: Sequence[float], like: Float[Tensor, "out"]) -> Float[Tensor, "out"]:
        """The same of its bias."""
        total = torch.zeros_like(like)
        for (_, update), gate in zip(self.updates, self._constant(weights), strict=True):
            if gate and (shift := update.shift(like)) is not None:
                total += gate * shift
        return total

    def _constant(self, weights: Sequence[float]) -> list[float]:
        factors = self.gates.factors[self.block].tolist()
        return [weights[k] * factors[k] for k, _ in self.updates]

    def alone(self, layer: nn.Module, x: Tensor, y: Tensor, k: int) -> Tensor:
        """What adapter k adds at its weight."""
        gate = self._dense(y)[:, k]
        return sum((_spread(gate, y) * add(layer, x.to(y.device), y) for add in self._adding(layer, y, k)), torch.zeros_like(y))

    def _adding(self, layer: nn.Module, y: Tensor, k: int) -> list[Forward]:
        return [add for (owner, _), add in zip(self.updates, self.prepare(layer, y), strict=True) if owner == k]

    def _dense(self, y: Tensor) -> Float[Tensor, "rows K"]:
        return self.gates.on(y.device).dense[:, self.block].to(y, copy=True)  # the buffer may be written before backward

    def __call__(self, layer: nn.Module, x: Float[Tensor, "rows *in"], y: Float[Tensor, "rows *out"]) -> Tensor | None:
        """What all of them add, as the gates say; None where none of them is live."""
        gates, x = self.gates, x.to(y.device)
        if gates.mode == "rows":
            return self._rowwise(layer, x, y)
        if gates.mode == "one":
            return self.alone(layer, x, y, gates.only) if self.of(gates.only) else None
        total = torch.zeros_like(y)
        dense = self._dense(y)
        for (k, _), add in zip(self.updates, self.prepare(layer, y), strict=True):
            gate = self._place(y, k) * dense[0, k] if gates.mode == "regional" else _spread(dense[:, k], y)
            total = total + gate * add(layer, x, y)
        return total

    def _rowwise(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """Rows of one adapter each: an operator computes its own rows alone."""
        runs, count = self.gates.runs, len(y) // len(self.gates.runs)
        scale = None if self.gates.even else self.gates.on(y.device).scale[:, self.block].to(y, copy=True)
        parts: list[Tensor | None] = []
        for run, k in enumerate(runs):
            rows = slice(run * count, (run + 1) * count)
            part = None
            for add in self._adding(layer, y, k):
                more = add(layer, x[rows], y[rows])
                more = more if scale is None else scale[run] * more
                part = more if part is None else part + more
            parts.append(part)
        if all(part is None for part in parts):
            return None
        return torch.cat([torch.zeros_like(y[: count]) if part is None else part for part in parts])

    def _place(self, y: Tensor, k: int) -> Tensor:
        """The share of adapter k at every place, in a shape that multiplies y."""
        place = self.gates.places[self.axis][:, k].to(y)
        if place.ndim == 1:
            return _spread(place, y)
        if y.ndim == 4:
            if y.shape[-2:] != place.shape[-2:]:
                raise RuntimeError(f"a layer has {y.shape[-2]} x {y.shape[-1]} places while its mask has {place.shape[-2]} x {place.shape[-1]}")
            return place[:, None]
        if y.ndim == 3 and y.shape[1] != place[0].numel():
            raise RuntimeError(f"a layer got {y.shape[1]} tokens while its mask has {place[0].numel()}")
        return place.flatten(1)[..., None]


def _spread(gate: Float[Tensor, "rows"], y: Tensor) -> Tensor:
    return gate.view(-1, *(1 for _ in y.shape[1:]))
