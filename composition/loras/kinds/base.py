"""What every kind of update offers, and what several kinds need: a layer's own weight, and its product without the bias.

A layer here is a Linear, a Conv2d or a norm of the base. A weight w of an adapter always multiplies the whole change: the layer's weight
becomes W + w * delta(W), its output y + w * forward(...)(layer, x, y).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import largest

# (the layer, its input, its output without any adapter) -> what an update adds to the output at weight 1
Forward = Callable[[nn.Module, Float[Tensor, "rows *in"], Float[Tensor, "rows *out"]], Float[Tensor, "rows *out"]]


@dataclass(frozen=True, eq=False)
class Operator(ABC):
    """The change of one layer by one adapter, of any kind but plain LoRA's `Factors`, which offer the same.

    rank: as the file's author would state it; 0 for a kind without. live: False when it changes nothing.
    """

    @property
    def rank(self) -> int:
        return 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As stored."""
        return tuple(_tensors(getattr(self, field.name) for field in fields(self)))

    @property
    def dtype(self) -> torch.dtype:
        """float64 where the file has float64, float32 otherwise: every stored number is one exactly."""
        return torch.float64 if any(tensor.dtype == torch.float64 for tensor in self.tensors) else torch.float32

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def live(self) -> bool:
        return any(largest(tensor) > 0 for tensor in self.tensors)

    @property
    def factors(self) -> Factors | None:
        """An exact LoRA that does the same, where one is small; None: it keeps an operator of its own."""
        return None

    @abstractmethod
    def delta(self, weight: Float[Tensor, "out *in"]) -> Float[Tensor, "out *in"]:
        """The exact change of the layer's weight at weight 1, where that weight is and in its dtype (float32 or better)."""

    def shift(self, like: Tensor) -> Float[Tensor, "out"] | None:
        """The change of the layer's bias, in the device and dtype of `like`; None for none."""
        return None

    @abstractmethod
    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        """What it adds to the layer's output, with everything made for activations in the device and dtype of `like`."""

    def part(self, part: Part) -> "Update":
        """The share of one of the layers that a fused layer's update is of. Raises ValueError where it cannot be told apart."""
        if (part.start, part.stop, part.turned) == (0, None, False):
            return self
        raise ValueError("its kind cannot be parted among the layers that it is of")


Update = Factors | Operator


@dataclass(frozen=True, eq=False)
class Several(Operator):
    """Updates of one layer that a file keeps beside each other, as a LoRA and a change of the bias: their sum."""

    updates: tuple[Update, ...]

    @property
    def rank(self) -> int:
        return max(update.rank for update in self.updates)

    def delta(self, weight: Tensor) -> Tensor:
        return sum((update.delta(weight) for update in self.updates[1:]), self.updates[0].delta(weight))

    def shift(self, like: Tensor) -> Float[Tensor, "out"] | None:
        shifts = [shift for update in self.updates if (shift := update.shift(like)) is not None]
        return sum(shifts[1:], shifts[0]) if shifts else None

    def forward(self, layer: nn.Module, like: Tensor) -> Forward:
        each = [update.forward(layer, like) for update in self.updates]
        return lambda layer, x, y: sum((add(layer, x, y) for add in each[1:]), each[0](layer, x, y))

    def part(self, part: Part) -> "Several":
        return Several(tuple(update.part(part) for update in self.updates))


def parted(update: Update) -> tuple[Factors | None, tuple[Update, ...]]:
    """An update as the factors that go into a layer's stack, and the operators beside them."""
    factors: list[Factors] = []
    rest: list[Update] = []
    for each in update.updates if isinstance(update, Several) else (update,):
        small = each.factors if not factors else None
        rest.append(each) if small is None else factors.append(small)
    return (factors[0] if factors else None), tuple(rest)


def _tensors(values: Iterator[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(iter(value))
        elif isinstance(value, Update):
            yield from value.tensors


# the layer's own weight and bias --------------------------------------------------------------------------------------


def wide(like: Tensor) -> torch.dtype:
    """What is prepared for activations like these is computed in this: float32 or better."""
    return torch.promote_types(like.dtype, torch.float32)


def applied(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's output, without a bias, if this were its weight."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight)


def base(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's own product with another input, without its bias; quantised and offloaded layers compute it their own way."""
    if plain(layer):
        return applied(layer, x, cast(Tensor, layer.weight).to(x))
    return linear(layer, layer.forward(x))


def linear(layer: nn.Module, y: Tensor) -> Tensor:
    """The layer's output without its bias."""
    bias = bias_of(layer, y)
    if bias is None:
        return y
    return y - (bias.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else bias)


def bias_of(layer: nn.Module, like: Tensor) -> Tensor | None:
    bias = cast(Tensor | None, layer.bias)
    if bias is not None and bias.is_meta:
        bias = _fetched(layer, "bias")
    return None if bias is None else bias.detach().to(like)


def weight_of(layer: nn.Module, like: Tensor) -> Float[Tensor, "out *in"]:
    """The layer's weight as numbers of `wide(like)`, where `like` is. That of a quantised linear is what it answers to each input alone."""
    if plain(layer):
        return cast(Tensor, layer.weight).detach().to(like.device, wide(like))
    if hasattr(layer, "_hf_hook"):
        return _fetched(layer, "weight").to(like.device, wide(like))
    if not isinstance(layer, nn.Linear):
        raise ValueError("the weight of a quantised convolution cannot be read")
    alone = torch.eye(layer.in_features, device=like.device, dtype=like.dtype)
    return torch.cat([linear(layer, layer.forward(rows)) for rows in alone.split(512)]).T.to(wide(like))


def plain(layer: nn.Module) -> bool:
    """True for floating-point weights that are where they are read from."""
    weight = layer.weight
    return (type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta
            and not hasattr(layer, "_hf_hook") and type(layer) in (nn.Linear, nn.Conv2d))


def _fetched(layer: nn.Module, name: str) -> Tensor:
    """A weight that its hook brings for each forward and takes away again."""
    hook: Any = layer._hf_hook
    hook.pre_forward(layer)
    try:
        return getattr(layer, name).detach().clone()
    finally:
        hook.post_forward(layer, torch.empty(0))
