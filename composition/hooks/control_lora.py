"""A control LoRA in a FLUX transformer: its updates added to the layers' outputs, the picture's latents read by the input projection.

No weight is touched: the widened projection of the original code is this model's own, plus the LoRA's product with both latents; a norm with
new weights is the same norm asked once more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from composition.loras.control_lora import INPUT, Change, ControlLora


class _Hook:
    """Changes what a layer answers."""

    def __init__(self, function: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.function(module, inputs[0], output)


@contextmanager
def controlled(transformer: nn.Module, lora: ControlLora, tokens: Float[Tensor, "1 N c"], strength: float = 1.0) -> Iterator[None]:
    """While it lasts, the transformer is controlled by a picture in all of its rows. tokens: its latents, packed as the picture's own.

    At strength 0 the transformer is the stock one. Raises RuntimeError at the end when the input projection did not run.
    """
    if strength == 0:
        yield
        return
    seen: list[bool] = []

    def changing(change: Change) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        return lambda module, x, y: _changed(change, x, y, strength)

    def reading(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(True)
        both = torch.cat([x, tokens.to(x).expand(x.shape[0], -1, -1)], -1)
        return _changed(lora.changes[INPUT], both, y, strength)

    def norming(weight: Tensor) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        return lambda module, x, y: _normed(module, weight, x, y, strength)

    functions = {path: reading if path == INPUT else changing(change) for path, change in lora.changes.items()}
    functions |= {path: norming(weight) for path, weight in lora.norms.items()}
    hooks = {path: _Hook(function) for path, function in functions.items()}
    try:
        for path, hook in hooks.items():
            transformer.get_submodule(path).register_forward_hook(hook)
        yield
    finally:
        _remove(transformer, set(hooks.values()))
    if not seen:
        raise RuntimeError(f"a control LoRA was to act on {INPUT}, and the model ran without it: it was compiled before it was there")


def abandon(transformer: nn.Module) -> None:
    """Take off what contexts that were interrupted while they began or ended have left."""
    left = {hook for module in transformer.modules() for hook in module._forward_hooks.values() if isinstance(hook, _Hook)}
    if left:
        _remove(transformer, left)


def _remove(transformer: nn.Module, hooks: set[_Hook]) -> None:
    for module in transformer.modules():
        for key, held in list(module._forward_hooks.items()):
            if isinstance(held, _Hook) and held in hooks:
                module._forward_hooks.pop(key, None)


def _changed(change: Change, x: Tensor, y: Tensor, strength: float) -> Tensor:
    down, up = change.down.to(y), change.up.to(y)
    bias = None if change.bias is None else change.bias.to(y)
    return y + F.linear(F.linear(x.to(y), down), up, bias) * strength


def _normed(module: nn.Module, weight: Tensor, x: Tensor, y: Tensor, strength: float) -> Tensor:
    """A norm's answer is linear in its weights: between the one with its own and the one with the new ones."""
    before = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight.to(x), requires_grad=False)
    try:
        new = type(module).forward(module, x)
    finally:
        module._parameters["weight"] = before
    return new if strength == 1 else torch.lerp(y, new, strength)
