"""Ways of offloading, imitated with the pretended device: where weights rest and when they move, as accelerate and diffusers do it.

none: all on the device. model: a component comes whole for its forward and goes to main memory again. sequential: layer by layer,
and at rest a layer's weights are on "meta", as accelerate leaves them. group: layer by layer, at rest in main memory. As there, a
module's `forward` is replaced, so that forward hooks registered on it run when its weights are at rest again.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from composition.backbones.loading.placement import Placement
from tests.composition.devices.pretended import CPU, DEVICE, move, move_own

OFFLOADS = ("none", "model", "sequential", "group")


def place(pipe: Any, offload: str) -> Placement:
    """Put the pipeline's weights where this way of offloading has them at rest."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for part in parts:
        if offload == "none":
            move(part, DEVICE)
            continue
        part._hf_hook = SimpleNamespace(execution_device=DEVICE, pre_forward=lambda module, *args, **kwargs: (args, kwargs))
        if offload == "model":
            _whole(part)
        else:
            for module in part.modules():
                _layer(module, offload)
    return Placement(DEVICE, next(parts[0].parameters()).dtype, offload, "")  # type: ignore[arg-type]


def _sent(value: Any) -> Any:
    return tree_map(lambda item: item.to(DEVICE) if isinstance(item, Tensor) else item, value)


def _whole(part: nn.Module) -> None:
    names = ("encode", "decode") if hasattr(part, "decode") else ("forward",)
    for name in names:
        own = getattr(part, name)

        def call(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            move(part, DEVICE)
            try:
                return own(*_sent(args), **_sent(kwargs))
            finally:
                move(part, CPU)

        setattr(part, name, call)


def _layer(module: nn.Module, offload: str) -> None:
    for name, value in module._buffers.items():  # buffers are not offloaded
        module._buffers[name] = value.to(DEVICE) if value is not None else None
    if not any(weight is not None for weight in module._parameters.values()):
        return
    own = module.forward
    if offload == "sequential":
        module._hf_hook = SimpleNamespace(execution_device=DEVICE)
        kept = {name: weight.detach().cpu() for name, weight in module._parameters.items() if weight is not None}

        def rest() -> None:
            for name, weight in kept.items():  # a dtype set while it was at rest is the dtype it comes with
                module._parameters[name] = nn.Parameter(weight.to("meta", module._parameters[name].dtype), requires_grad=False)

        def come() -> None:
            for name, weight in kept.items():
                module._parameters[name] = nn.Parameter(weight.to(DEVICE, module._parameters[name].dtype), requires_grad=False)
    else:
        def rest() -> None:
            move_own(module, CPU)
            _layer_buffers(module)

        def come() -> None:
            move_own(module, DEVICE)

    def call(*args: Any, **kwargs: Any) -> Any:
        come()
        try:
            return own(*_sent(args), **_sent(kwargs))
        finally:
            rest()

    rest()
    module.forward = call


def _layer_buffers(module: nn.Module) -> None:
    for name, value in module._buffers.items():
        if value is not None:
            module._buffers[name] = value.to(DEVICE)


def resting(module: nn.Module) -> set[torch.device]:
    """Where its weights are."""
    return {weight.device for weight in module.parameters()}
