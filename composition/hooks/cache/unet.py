"""A feature cache with one slot per adapter: a pass that computes the outer levels of a UNet and takes the rest from a slot.

Neighbouring steps have nearly the same deep features (DeepCache, arXiv 2312.00858). A full pass stores what enters the
first live up block; a cached pass runs the same outer levels, LoRAs included, on that. At age 0 both give the same output.
A transformer's cache is in `transformer`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from composition.hooks.cache.base import Cache


class FeatureCache(Cache):
    """Slots for one UNet (diffusers' UNet2DConditionModel), by adapter's name. Use it inside `attached`.

    live: outer levels that every pass computes: as few as keep cross-attention, and so attention LoRA, in play (1 for
    Stable Diffusion 1.x, 2 for SDXL, whose outermost level has none), 1 where no level may be skipped with attention live.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.unet = unet
        self.live = live_levels(unet)

    def skips(self, path: str) -> bool:
        """Whether a cached pass leaves this layer out."""
        kind, _, rest = path.partition(".")
        number = int(rest.partition(".")[0]) if rest[:1].isdigit() else -1
        depth = len(self.unet.down_blocks)
        if kind == "down_blocks":
            return number >= self.live or number == self.live - 1 and ".downsamplers." in path
        return kind == "mid_block" or (kind == "up_blocks" and number < depth - self.live)

    def _blocks(self) -> list[nn.Module]:
        """The last is the one whose output the first live up block reads."""
        depth = len(self.unet.down_blocks)
        if depth <= self.live:
            return []
        mid = [self.unet.mid_block] if self.unet.mid_block is not None else []
        downsamplers = self.unet.down_blocks[self.live - 1].downsamplers or []
        return [*downsamplers, *self.unet.down_blocks[self.live :], *mid, *self.unet.up_blocks[: depth - self.live]]

    def _wrapped(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        last = block is self.unet.up_blocks[len(self.unet.down_blocks) - self.live - 1]
        return self._last_of(forward) if last else self._skipping(block, forward)

    def _skipping(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        down = any(block is other for other in self.unet.down_blocks)
        kept = len(block.resnets) + bool(getattr(block, "downsamplers", None)) if down else 0

        def call(hidden_states: Tensor, *args: Any, **named: Any) -> Any:
            if self._features is None:
                return forward(hidden_states, *args, **named)
            nothing = hidden_states.new_zeros(())  # nobody reads these; a ControlNet's residuals, whatever their size, can be added to them
            return (nothing, (nothing,) * kept) if down else nothing

        return call

    def _last_of(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self._features is not None:
                return self._features
            self._recorded = forward(*args, **named)
            return self._recorded

        return call


def live_levels(unet: Any) -> int:
    """Outer levels that stay live: the fewest with cross-attention that leave a level to skip; else 1."""
    depth = len(unet.down_blocks)
    for live in range(1, depth):
        outer = [*unet.down_blocks[:live], *unet.up_blocks[depth - live :]]
        if any(getattr(block, "has_cross_attention", False) for block in outer):
            return live
    return 1
