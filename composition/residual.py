"""A transformer's feature cache with one slot per adapter: the blocks after the first as one residual.

A full pass stores what all blocks after the first added to the picture's tokens; a cached pass runs the first block, LoRAs included,
and adds that (first-block caching of diffusion transformers). At age 0 both give the same output but for rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from composition.cache import Cache, FeatureCache, share_of


def of(denoiser: Any) -> Cache:
    """The cache that fits this denoiser: a UNet's or a transformer's."""
    return FeatureCache(denoiser) if hasattr(denoiser, "down_blocks") else ResidualCache(denoiser)


class ResidualCache:
    """Slots for one FluxTransformer2DModel or SD3Transformer2DModel, by adapter's name. Use it inside `attached`."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self._names = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(transformer, name)]
        self._later = [block for name in self._names for block in getattr(transformer, name)][1:]
        self._slots: dict[str, Float[Tensor, "rows N D"]] = {}
        self._recorded: Tensor | None = None
        self._given: Tensor | None = None
        self._entered: Tensor | None = None

    @property
    def usable(self) -> bool:
        return bool(self._later)

    def has(self, name: str) -> bool:
        return name in self._slots

    @contextmanager
    def attached(self) -> Iterator[None]:
        if not self.usable:
            raise RuntimeError("a transformer of one block has nothing to cache")
        before = {block: block.__dict__.get("forward") for block in self._later}
        try:
            for block in self._later:
                block.forward = self._led(block.forward, first=block is self._later[0], last=block is self._later[-1])
            yield
        finally:
            for block, forward in before.items():
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward
            self._slots, self._recorded, self._given, self._entered = {}, None, None, None

    @contextmanager
    def full(self, names: Sequence[str]) -> Iterator[None]:
        self._given = self._recorded = None
        yield
        if self._recorded is None:
            raise RuntimeError("the cache saw no pass of the transformer: its blocks are not the ones that ran")
        for name, part in zip(names, self._recorded.chunk(len(names)), strict=True):
            self._slots[name] = part
        self._recorded = self._entered = None

    @contextmanager
    def cached(self, names: Sequence[str]) -> Iterator[None]:
        self._given = torch.cat([self._slots[name] for name in names])
        try:
            yield
        finally:
            self._given = None

    def share(self, axis: Callable[[str], Any], shape: Sequence[int], tokens: int) -> float:
        return share_of(self.transformer, self.skips, axis, shape, tokens)

    def skips(self, path: str) -> bool:
        """Whether a cached pass leaves this layer out."""
        return path.startswith(tuple(f"{name}." for name in self._names)) and not path.startswith(f"{self._names[0]}.0.")

    def _led(self, forward: Callable[..., Any], *, first: bool, last: bool) -> Callable[..., Any]:
        """A block's forward, (picture's tokens, the text's, ...) -> (the text's, the picture's), through the cache."""

        def call(hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Any, Tensor]:
            if self._given is not None:
                return encoder_hidden_states, hidden_states + self._given if last else hidden_states
            if first:
                self._entered = hidden_states
            text, picture = forward(hidden_states, encoder_hidden_states, *args, **named)
            if last and self._entered is not None:
                self._recorded = picture - self._entered
            return text, picture

        return call
