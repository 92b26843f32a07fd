"""A transformer's feature cache with one slot per adapter: the blocks after the first as one residual.

A full pass stores what all blocks after the first added to the picture's tokens; a cached pass runs the first block, LoRAs included,
and adds that (first-block caching of diffusion transformers). At age 0 both give the same output but for rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from composition.hooks.cache.base import Cache


class ResidualCache(Cache):
    """Slots for one FluxTransformer2DModel or SD3Transformer2DModel, by adapter's name. Use it inside `attached`."""

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        self._names = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(transformer, name)]
        self._entered: Tensor | None = None

    @contextmanager
    def full(self, names: Sequence[str]) -> Iterator[None]:
        try:
            with super().full(names):
                yield
        finally:
            self._entered = None

    def skips(self, path: str) -> bool:
        return path.startswith(tuple(f"{name}." for name in self._names)) and not path.startswith(f"{self._names[0]}.0.")

    def _blocks(self) -> list[nn.Module]:
        return [block for name in self._names for block in getattr(self.denoiser, name)][1:]

    def _wrapped(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward is (picture's tokens, the text's, ...) -> (the text's, the picture's)."""
        first, last = block is self._blocks()[0], block is self._blocks()[-1]

        def call(hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Any, Tensor]:
            if self._features is not None:
                return encoder_hidden_states, hidden_states + self._features if last else hidden_states
            if first:
                self._entered = hidden_states
            text, picture = forward(hidden_states, encoder_hidden_states, *args, **named)
            if last and self._entered is not None:
                self._recorded = picture - self._entered
            return text, picture

        return call
