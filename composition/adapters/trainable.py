"""Adapters in training: the factors of K new adapters of one rank in one leaf, so that a step costs the same calls whatever K is.

Row k of the leaf is adapter k: for every layer its down (r, in, *kernel) and its up (out, r), one after the other. A
layer's factors are views of the leaf's columns; gradients arrive in one tensor of its shape, where an adapter's length
is the norm of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from composition.adapters.gates import Gates
from composition.adapters.operators import Operators
from composition.adapters.stack import Product, Stack
from composition.loras.kinds.lora import Factors


class Shape(NamedTuple):
    """Input and output of a layer's adapter."""

    reads: tuple[int, ...]  # in, *kernel
    out: int

    @staticmethod
    def of(module: nn.Linear | nn.Conv2d) -> "Shape":
        """As the module was declared: a quantised weight is stored in a shape of its own."""
        if isinstance(module, nn.Conv2d):
            high, wide = module.kernel_size
            return Shape((module.in_channels // module.groups, high, wide), module.out_channels)
        return Shape((module.in_features,), module.out_features)


class Trainable:
    """The leaf and where each layer's factors lie in it.

    layers: component to layer path to shape. All factors begin at zero.
    """

    def __init__(
        self, names: Sequence[str], rank: int, layers: Mapping[str, Mapping[str, Shape]], device: torch.device
    ) -> None:
        self.names, self.rank, self.layers = tuple(names), rank, layers
        shapes = [shape for by_path in layers.values() for shape in by_path.values()]
        count = len(self.names)
        self._views = [view for reads, out in shapes for view in ((count, rank, *reads), (count, out, rank))]
        self._sizes = [torch.Size(view).numel() // count for view in self._views]
        self.leaf = torch.zeros(count, sum(self._sizes), device=device, requires_grad=True)
        self._ready: dict[tuple[torch.dtype, torch.device, bool], tuple[Tensor, ...]] = {}

    def read(self, slot: int, like: Tensor) -> tuple[Float[Tensor, "K r in *kernel"], Float[Tensor, "K out r"]]:
        """The factors of layer `slot` in the order of `layers`, in the device and dtype of `like`.

        The whole leaf is converted at once and then split; the result is cached until `changed`.
        """
        key = (like.dtype, like.device, torch.is_grad_enabled())
        if key not in self._ready:
            parts = self.leaf.to(like.device, like.dtype).split(self._sizes, dim=1)
            self._ready[key] = tuple(part.view(view) for part, view in zip(parts, self._views, strict=True))
        down, up = self._ready[key][2 * slot : 2 * slot + 2]
        return down, up

    def changed(self) -> None:
        """Announce that the leaf's values have changed."""
        self._ready.clear()

    def factors(self, k: int) -> dict[str, dict[str, Factors]]:
        """Adapter k's factors by component and layer: views of the leaf; call `changed` after writing to them."""
        parts = iter([part.view(view[1:]) for part, view in zip(self.leaf.detach()[k].split(self._sizes), self._views, strict=True)])
        return {component: {path: Factors(next(parts), next(parts)) for path in by_path} for component, by_path in self.layers.items()}


class TrainableStack(Stack):
    """A layer's adapters in training, layer `slot` of the leaf; gates act on them as on any others."""

    def __init__(self, source: Trainable, slot: int, gates: Gates, block: int, axis: Any = None, path: str = "") -> None:
        self.source, self.slot = source, slot
        self.gates, self.block, self.axis, self.path = gates, block, axis, path
        self.operators = Operators((), gates, block, axis)
        self.spans = tuple((k * source.rank, (k + 1) * source.rank) for k in range(len(source.names)))

    def product(self, like: Tensor) -> Product:
        down, up = self.source.read(self.slot, like)
        return Product(down.flatten(0, 1), up.transpose(0, 1).flatten(1), self._owners(like.device))

    def each(self, like: Tensor, index: Int[Tensor, "runs"] | None) -> tuple[Float[Tensor, "runs r in *kernel"], Float[Tensor, "runs out r"]]:
        down, up = self.source.read(self.slot, like)
        return (down, up) if index is None else (down.index_select(0, index), up.index_select(0, index))
