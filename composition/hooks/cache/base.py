"""Slots of one denoiser, one per adapter: a full pass fills them, a cached pass takes what is deep in the network from them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composition.hooks.costs import layer_costs

_BEFORE = "medley_before"  # on a wrapped forward: the block's own attribute before, or None


def abandon(denoiser: nn.Module) -> None:
    """Give every block its forward back that a cache has left wrapped: one that was interrupted while it was attached or taken off."""
    for block in denoiser.modules():
        while _BEFORE in getattr(block.__dict__.get("forward"), "__dict__", {}):
            _unwrap(block)


def _unwrap(block: nn.Module) -> None:
    before = vars(block.__dict__["forward"])[_BEFORE]
    if before is None:
        del block.__dict__["forward"]
    else:
        block.__dict__["forward"] = before


class Cache:
    """Slots of one denoiser, by adapter's name; a subclass says which blocks it wraps and how. Use it inside `attached`."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self._slots: dict[str, Float[Tensor, "rows ..."]] = {}
        self._recorded: Tensor | None = None
        self._features: Tensor | None = None

    @property
    def usable(self) -> bool:
        """False for a denoiser with nothing to skip."""
        return bool(self._blocks())

    def has(self, name: str) -> bool:
        return name in self._slots

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Pass the denoiser's inner blocks through the cache; every forward is as before afterwards, the slots empty."""
        if not self.usable:
            raise RuntimeError("a denoiser of one block or level has nothing to cache")
        blocks: list[Any] = self._blocks()
        wrapped: dict[Any, Any] = {}
        try:
            for block in blocks:
                wrapped[block] = self._wrapped(block, block.forward)
                vars(wrapped[block])[_BEFORE] = block.__dict__.get("forward")
                block.forward = wrapped[block]
            yield
        finally:
            for block, forward in wrapped.items():
                if block.__dict__.get("forward") is forward:  # not what a later cache has put there since `abandon`
                    _unwrap(block)
            self._slots, self._recorded, self._features = {}, None, None

    @contextmanager
    def full(self, names: Sequence[str]) -> Iterator[None]:
        """A full pass whose batch is these adapters' rows, equally many each, in this order: it fills their slots."""
        self._features = self._recorded = None
        yield
        if self._recorded is None:
            raise RuntimeError("the cache saw no pass of the denoiser: its blocks are not the ones that ran")
        for name, part in zip(names, self._recorded.chunk(len(names)), strict=True):
            self._slots[name] = part
        self._recorded = None

    @contextmanager
    def cached(self, names: Sequence[str]) -> Iterator[None]:
        """A pass over these adapters' rows from their slots; the slots stay as they are."""
        self._features = torch.cat([self._slots[name] for name in names])
        try:
            yield
        finally:
            self._features = None

    def share(self, axis: Callable[[str], Any], shape: Sequence[int], tokens: int) -> float:
        """Cost of a cached pass over a full one: multiply-adds of linear layers and convolutions, attention products left out.

        axis: layer to where its rows lie (`Backbone.axis`). shape: (H, W) of the latent. tokens: of the prompt.
        """
        costs = layer_costs(self.denoiser, axis, shape, tokens)
        return sum(cost for path, cost in costs.items() if not self.skips(path)) / sum(costs.values())

    def skips(self, path: str) -> bool:
        """Whether a cached pass leaves this layer out."""
        raise NotImplementedError

    def _blocks(self) -> list[nn.Module]:
        """Blocks that a cached pass leaves out, in the order in which they run."""
        raise NotImplementedError

    def _wrapped(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward through the cache: it fills _recorded in a full pass and returns _features in a cached one."""
        raise NotImplementedError
