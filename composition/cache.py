"""A feature cache with one slot per adapter: a pass that computes the outer levels of a UNet and takes the rest from a slot.

Neighbouring steps have nearly the same deep features (DeepCache, arXiv 2312.00858). A full pass stores what enters the
first live up block; a cached pass runs the same outer levels, LoRAs included, on that. At age 0 both give the same output.
A transformer's cache, and the choice between both, is in `residual`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Cache:
    """Slots of one denoiser, by adapter's name; a kind says which blocks it leads and how. Use it inside `attached`."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self._slots: dict[str, Float[Tensor, "rows ..."]] = {}
        self._recorded: Tensor | None = None
        self._given: Tensor | None = None

    @property
    def usable(self) -> bool:
        """False for a denoiser with nothing to skip."""
        return bool(self._blocks())

    def has(self, name: str) -> bool:
        return name in self._slots

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Lead the denoiser's inner blocks through the cache; every forward is as before afterwards, the slots empty."""
        if not self.usable:
            raise RuntimeError("a denoiser of one block or level has nothing to cache")
        blocks: list[Any] = self._blocks()
        before = {block: block.__dict__.get("forward") for block in blocks}
        try:
            for block in blocks:
                block.forward = self._led(block, block.forward)
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
            raise RuntimeError("the cache saw no pass of the denoiser: its blocks are not the ones that ran")
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

    def _led(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward through the cache: it fills _recorded in a full pass and answers from _given in a cached one."""
        raise NotImplementedError


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

    def _led(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        last = block is self.unet.up_blocks[len(self.unet.down_blocks) - self.live - 1]
        return self._last_of(forward) if last else self._skipping(block, forward)

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
