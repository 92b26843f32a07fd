"""ControlNets on a UNet: the residuals of stock ControlNets, summed, in every evaluation (arXiv 2302.05543).

A ControlNet reads what the UNet reads, and the picture that controls; what it answers is added to the UNet's skips and to its middle,
as in stock pipelines. LoRAs do not act on it. It has its gradient, for methods that move latents. A pass through a cache
(`hooks.cache.unet`) takes what is deep from its slot, with the residuals of the step that filled it, and this step's at the outer levels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from composition.hooks import attention
from composition.hooks.regional import Segments, split


class Control(NamedTuple):
    """A ControlNet, the picture it reads, of the size of the pictures that are made, and its strength; at 0 it is not there."""

    net: Any  # diffusers' ControlNetModel
    hint: Float[Tensor, "1 3 H W"]
    strength: float = 1.0


class _Hook:
    """Adds the residuals to what the UNet is called with. calls: how often it did."""

    def __init__(self, controls: Sequence[Control]) -> None:
        self.controls, self.calls = controls, 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.calls += 1
        down, mid = self.residuals(args[0], args[1], named["encoder_hidden_states"], named.get("added_cond_kwargs"))
        return args, named | {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    def residuals(
        self, sample: Float[Tensor, "rows C h w"], t: Tensor, text: Float[Tensor, "rows L D"], added: Mapping[str, Tensor] | None
    ) -> tuple[list[Tensor], Tensor]:
        """The sum over the ControlNets: one tensor for each skip of the UNet, and the middle's."""
        total: list[Tensor] = []
        for control in self.controls:
            hint = control.hint.to(sample).expand(sample.shape[0], -1, -1, -1)
            down, mid = control.net(
                sample, t, encoder_hidden_states=text, controlnet_cond=hint, conditioning_scale=control.strength, added_cond_kwargs=added,
                return_dict=False)
            total = [a + b for a, b in zip(total, [*down, mid], strict=True)] if total else [*down, mid]
        return total[:-1], total[-1]


@contextmanager
def controlled(unet: nn.Module, controls: Sequence[Control], *, segments: Segments | None = None) -> Iterator[None]:
    """While it lasts, every evaluation of the UNet has these ControlNets' residuals, in all of its rows.

    segments: of a regional prompt: they read each segment where the UNet reads it. Without one of a strength other than 0 the UNet is the stock one. Raises RuntimeError at the end when the UNet ran without them.
    """
    controls = [control for control in controls if control.strength != 0]
    if not controls:
        yield
        return
    hook = _Hook(controls)
    try:
        unet.register_forward_pre_hook(hook, with_kwargs=True)
        with ExitStack() as stack:
            for net in {id(control.net): control.net for control in controls}.values():
                if segments is None:
                    break
                layers = _reading(net)
                override = split(layers, segments.grids(set(layers.values())), segments)
                stack.enter_context(attention.override(net, tuple(layers), override))
            yield
    finally:
        _remove(unet, hook)
    if not hook.calls:
        raise RuntimeError("ControlNets were to act on the UNet, and it ran without them: it was compiled before they were there")


def _reading(net: Any) -> dict[str, int]:
    """The layers of a ControlNet that read the prompt, and the level of the grid each lies on."""
    names = [name for name, _ in net.named_modules() if name.endswith(".attn2")]
    return {name: int(name.split(".")[1]) if name.startswith("down_blocks.") else len(net.down_blocks) - 1 for name in names}


def abandon(unet: nn.Module) -> None:
    """Take off what contexts that were interrupted while they began or ended have left."""
    for hook in list(unet._forward_pre_hooks.values()):
        if isinstance(hook, _Hook):
            _remove(unet, hook)


def _remove(unet: nn.Module, hook: _Hook) -> None:
    for key, held in list(unet._forward_pre_hooks.items()):
        if held is hook:
            unet._forward_pre_hooks.pop(key, None)
            unet._forward_pre_hooks_with_kwargs.pop(key, None)


def hint(picture: Image.Image, size: tuple[int, int]) -> Float[Tensor, "1 3 H W"]:
    """What a ControlNet reads of a picture for pictures of this (width, height): 0..1, resized as stock pipelines do."""
    picture = picture.convert("RGB")
    picture = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
