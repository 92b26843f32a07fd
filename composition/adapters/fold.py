"""The fold: W + sum w D written into the layers' weights, and into their biases; the originals kept beside and put back. D is B A, or what
another kind of update makes of W.

A forward then costs what the bare base costs. The originals are copied, never subtracted from, to where there is room: the device
that holds the weights, else main memory; with room in neither, nothing is folded and the adapters stay live.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from composition.adapters.stack import Stack

GIB = 2**30
SPARE = 2 * GIB  # bytes that a copy must leave for a picture's activations and decoding; for small models twice their weights
CPU = torch.device("cpu")

Layers = Mapping[str, tuple[nn.Module, Stack]]  # by path
Free = Callable[[torch.device], int]  # bytes free on a device


class Keep(NamedTuple):
    """Where the originals are kept (None: nowhere, so nothing may be folded), in words for the picture's notes too.

    beside: they are where the weights are, the usual case.
    """

    device: torch.device | None
    why: str
    beside: bool = True


def foldable(layers: Layers) -> bool:
    """True when these are plain floating-point weights that may be written: not quantized, not coming and going layer by layer."""
    for module, stack in layers.values():
        weight = module.weight
        if module.bias is None and stack.operators.shifting:
            return False  # there is nowhere to write it
        if type(module) not in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm) or not isinstance(weight, nn.Parameter) or hasattr(module, "_hf_hook"):
            return False
        # A wrapper is a tensor with a format of its own: torchao's say that they are floating-point.
        if is_traceable_wrapper_subclass(weight) or not weight.is_floating_point() or weight.itemsize < 2 or weight.is_meta:
            return False
    return True


def size(layers: Layers) -> tuple[int, torch.device]:
    """Bytes of these layers' weights that are written, and where they are."""
    weights = [cast(Tensor, getattr(module, name)) for module, stack in layers.values() for name in _written(stack)]
    return sum(weight.numel() * weight.itemsize for weight in weights), weights[0].device if weights else CPU


def keep(need: int, device: torch.device, free: Free) -> Keep:
    """Where copies of so many bytes of weights fit that are on this device. free: asked of it and, if it is full, of main memory."""
    rooms: list[str] = []
    for place in dict.fromkeys((device, CPU)):
        room = free(place)
        name = "main memory" if place.type == "cpu" else str(place)
        if need + min(SPARE, 2 * need) <= room:
            return Keep(place, f"folded into the weights; the originals are kept in {name}", place == device)
        rooms.append(f"{name} has {room / GIB:.1f} GiB free")
    return Keep(None, f"computed live: a copy of the weights takes {need / GIB:.1f} GiB, {' and '.join(rooms)}")


class Fold:
    """One set's sum in the weights of its layers. `write` and `lift` may be called at any time and again: after an interruption
    in the middle of either, either one makes it whole."""

    def __init__(self, layers: Layers, weights: Sequence[float], device: torch.device | None = None) -> None:
        """device: where the originals are kept; None: where each weight is."""
        self.layers, self.weights, self._device = dict(layers), tuple(weights), device
        self._originals: dict[tuple[str, str], Tensor] = {}  # by path and name
        self.whole = False  # the sum is in all of the weights

    @torch.no_grad()
    def write(self) -> None:
        """The sum is in the weights. Raises whatever the copying raises; `lift` then gives the originals back."""
        for path, (module, stack) in self.layers.items():
            for name in _written(stack):
                weight = cast(Tensor, getattr(module, name))
                if (path, name) not in self._originals:
                    self._originals[path, name] = _copied(weight.detach(), self._device or weight.device)
                original = self._originals[path, name].to(weight.device, torch.promote_types(weight.dtype, torch.float32))
                change = stack.change(self.weights, original) if name == "weight" else stack.operators.shift(self.weights, original)
                weight.copy_(original + change)
        self.whole = True

    @torch.no_grad()
    def lift(self) -> None:
        """The originals are in the weights, wherever these are by now."""
        self.whole = False
        for (path, name), original in self._originals.items():
            cast(Tensor, getattr(self.layers[path][0], name)).copy_(original)


def _written(stack: Stack) -> tuple[str, ...]:
    return ("weight", "bias") if stack.operators.shifting else ("weight",)


def _copied(weight: Tensor, device: torch.device) -> Tensor:
    """A copy, in page-locked memory when it leaves a CUDA device."""
    pin = weight.device.type == "cuda" and device.type == "cpu"
    return torch.empty(weight.shape, dtype=weight.dtype, device=device, pin_memory=pin).copy_(weight)
