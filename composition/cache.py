"""A feature cache with one slot per adapter: a pass that computes the outer levels of a UNet and takes the rest from a slot.

Neighbouring steps have nearly the same deep features (DeepCache, arXiv 2312.00858). A full pass stores what enters the
first live up block; a cached pass runs the same outer levels, LoRAs included, on that. At age 0 both give the same output.
A transformer's cache, and the choice between both, is in `residual`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class Cache(Protocol):
    """Slots of one denoiser, by adapter's name; empty outside `attached`."""

    @property
    def usable(self) -> bool:
        """False for a denoiser with nothing to skip."""
        ...

    def has(self, name: str) -> bool: ...

    def attached(self) -> AbstractContextManager[None]:
        """Lead the denoiser through the cache; every forward is as before afterwards, the slots empty."""
        ...

    def full(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """A full pass whose batch is these adapters' rows, equally many each, in this order: it fills their slots."""
        ...

    def cached(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """A pass over these adapters' rows from their slots; the slots stay as they are."""
        ...

    def share(self, axis: Callable[[str], Any], shape: Sequence[int], tokens: int) -> float:
        """Cost of a cached pass over a full one: multiply-adds of linear layers and convolutions, attention products left out.

        axis: layer to where its rows lie (`Backbone.axis`). shape: (H, W) of the latent. tokens: of the prompt.
        """
        ...


class FeatureCache:
    """Slots for one UNet (diffusers' UNet2DConditionModel), by adapter's name. Use it inside `attached`.

    live: outer levels that every pass computes: as few as keep cross-attention, and so attention LoRA, in play (1 for
    Stable Diffusion 1.x, 2 for SDXL, whose outermost level has none), 1 where no level may be skipped with attention live.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.live = live_levels(unet)
        self._slots: dict[str, Float[Tensor, "rows C H W"]] = {}
        self._recorded: Tensor | None = None
        self._given: Tensor | None = None

    @property
    def usable(self) -> bool:
        """False for a UNet of one level: there is nothing to skip."""
        return len(self.unet.down_blocks) > self.live

    def has(self, name: str) -> bool:
        return name in self._slots

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Lead the UNet's inner blocks through the cache; every block's forward is as before afterwards, the slots empty."""
        if not self.usable:
            raise RuntimeError("a UNet of one level has nothing to cache")
        blocks = [*self._inner(), self._last()]
        before = {block: block.__dict__.get("forward") for block in blocks}
        try:
            for block in self._inner():
                block.forward = self._skipping(block, block.forward)
            last = self._last()
            last.forward = self._last_of(last.forward)
            yield
        finally:
            for block, forward in before.items():
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward
            self._slots, self._recorded, self._given = {}, None, None

    @contextmanager
    def full(self, names: Sequence[str]) -> Iterator[None]:
        """A full pass whose batch is these adapters' rows, equally many each, in this order: it fills their slots."""
        self._given = self._recorded = None
        yield
        if self._recorded is None:
            raise RuntimeError("the cache saw no pass of the UNet: its blocks are not the ones that ran")
        for name, part in zip(names, self._recorded.chunk(len(names)), strict=True):
            self._slots[name] = part
        self._recorded = None

    @contextmanager
    def cached(self, names: Sequence[str]) -> Iterator[None]:
        """A pass over these adapters' rows from their slots; the slots stay as they are."""
        self._given = torch.cat([self._slots[name] for name in names])
        try:
            yield
        finally:
            self._given = None

    def share(self, axis: Callable[[str], Any], shape: Sequence[int], tokens: int) -> float:
        return share_of(self.unet, self.skips, axis, shape, tokens)

    def skips(self, path: str) -> bool:
        """Whether a cached pass leaves this layer out."""
        kind, _, rest = path.partition(".")
        number = int(rest.partition(".")[0]) if rest[:1].isdigit() else -1
        depth = len(self.unet.down_blocks)
        if kind == "down_blocks":
            return number >= self.live or number == self.live - 1 and ".downsamplers." in path
        return kind == "mid_block" or (kind == "up_blocks" and number < depth - self.live)

    def _inner(self) -> list[nn.Module]:
        """Blocks that a cached pass leaves out, the last of them excepted."""
        depth = len(self.unet.down_blocks)
        mid = [self.unet.mid_block] if self.unet.mid_block is not None else []
        downsamplers = self.unet.down_blocks[self.live - 1].downsamplers or []
        return [*downsamplers, *self.unet.down_blocks[self.live :], *mid, *self.unet.up_blocks[: depth - self.live - 1]]

    def _last(self) -> nn.Module:
        """The block whose output the first live up block reads."""
        return self.unet.up_blocks[len(self.unet.down_blocks) - self.live - 1]

    def _skipping(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        down = any(block is one for one in self.unet.down_blocks)
        kept = len(block.resnets) + bool(getattr(block, "downsamplers", None)) if down else 0

        def call(hidden_states: Tensor, *args: Any, **named: Any) -> Any:
            if self._given is None:
                return forward(hidden_states, *args, **named)
            return (hidden_states, (hidden_states,) * kept) if down else hidden_states  # nobody reads these

        return call

    def _last_of(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self._given is not None:
                return self._given
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


def share_of(
    denoiser: nn.Module, skips: Callable[[str], bool], axis: Callable[[str], Any], shape: Sequence[int], tokens: int
) -> float:
    """`Cache.share` of a pass that leaves out the layers that `skips` names."""
    costs = layer_costs(denoiser, axis, shape, tokens)
    return sum(cost for path, cost in costs.items() if not skips(path)) / sum(costs.values())


def layer_costs(denoiser: nn.Module, axis: Callable[[str], Any], shape: Sequence[int], tokens: int) -> Mapping[str, int]:
    """Multiply-adds of every linear layer and convolution for one row: size of its weight times the places it is applied to."""
    costs = {}
    for path, module in denoiser.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        where = axis(path)
        level = 2**where.level
        grid = -(-shape[0] // level) * -(-shape[1] // level)
        places = {"grid": grid, "text": tokens, "both": grid + tokens, "none": 1}[where.kind]
        costs[path] = module.weight.numel() * places
    return costs
