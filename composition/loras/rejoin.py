"""Layers of a base as the layers of a file again: a transformer's q, k and v become the one layer that its authors' code, and kohya's files, have.

Exact: layers that share their down factor get one of the same rank, others factors that lie side by side, each acting on its own rows.
"""

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from composition.loras import fused
from composition.loras.fused import Part
from composition.loras.kinds.lora import Factors
from composition.loras.layers import Layer, layers, shape


def authored(transformer: nn.Module, updates: Mapping[str, Factors]) -> dict[str, Factors]:
    """Updates by path of diffusers' transformer to updates by the authors' names; a layer without one keeps its path."""
    own, left, joined = layers(transformer), dict(updates), {}
    for name, parts in fused.names(transformer).items():  # a name for all of a layer comes before XLabs' for a part of it
        if any(part.path in left for part in parts):
            joined[name] = _joined([(part, left.pop(part.path, None)) for part in parts], own)
    return joined | left


def _joined(parts: list[tuple[Part, Factors | None]], own: Mapping[str, Layer]) -> Factors:
    present = [(part, update) for part, update in parts if update is not None]
    if len(parts) == 1:
        part, update = present[0]
        return Factors(update.stored_down, _turned(part, update.stored_up), update.alpha)
    scales = {update.scale for _, update in present}
    rows = {part: shape(own[part.path])[0] for part, _ in parts}
    first = present[0][1]
    if len(scales) == 1 and all(_same(update.stored_down, first.stored_down) for _, update in present):
        ups = [first.stored_up.new_zeros(rows[part], first.rank) if update is None else update.stored_up.flatten(1) for part, update in parts]
        return Factors(first.stored_down, torch.cat(ups), first.alpha)
    rank = sum(update.rank for _, update in present)
    alike, kind = len(scales) == 1, reduce(torch.promote_types, (update.stored_up.dtype for _, update in present))
    down = torch.cat([update.stored_down for _, update in present])
    up = torch.zeros(sum(rows.values()), rank, dtype=kind if alike else torch.float64)
    top = left = 0
    for part, update in parts:
        if update is not None:
            up[top : top + rows[part], left : left + update.rank] = update.stored_up.flatten(1) if alike else update.stored_up.flatten(1).double() * update.scale
            left += update.rank
        top += rows[part]
    return Factors(down, up, scales.pop() * rank if alike else None)


def _turned(part: Part, up: Tensor) -> Tensor:
    """The halves of the rows back in the authors' order."""
    return up.roll(up.shape[0] // 2, 0) if part.turned else up


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and (first.data_ptr() == second.data_ptr() or torch.equal(first, second))
