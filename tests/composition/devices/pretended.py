"""A second device that is not there: tensors that compute on the CPU and refuse to meet plain CPU tensors.

`with pretended():` makes torch know DEVICE. A tensor on it is a subclass without memory of its own kind, so values,
gradients and every operation of the CPU are there; what the mode adds is the law of a device apart, as CUDA has it:

- an operation on tensors of both kinds raises RuntimeError, but for plain numbers (0-dimensional CPU tensors), for `copy_`
  and slice assignment, and for CPU indices of a tensor on the device;
- `.to`, `.cpu` and `device=` convert; `.numpy()` and numpy's own conversion raise TypeError;
- a generator of the CPU makes no numbers on the device.

What it cannot show: streams, memory that runs out, kernels that are missing or round otherwise, and operations that reach
C++ without a Python call of torch (none in what is tested here). Its type is "privateuseone", so code that asks for
"cuda" by name takes its other branch; that is for tests/gpu.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("privateuseone:0")
CPU = torch.device("cpu")

_INDEXED = (Tensor.__getitem__, torch.index_put, Tensor.index_put, Tensor.index_put_, torch.index_put_)
_COPIES = (Tensor.copy_, Tensor.__setitem__)
_OWN = (Tensor.device.__get__, Tensor.__repr__, Tensor.size, Tensor.dim, Tensor.__len__, Tensor.data_ptr)  # type: ignore[attr-defined]
_MOVES = (Tensor.to, Tensor.type_as)


class PretendedTensor(Tensor):
    """A tensor on DEVICE. Made by `.to(DEVICE)` or `device=DEVICE` inside `pretended`."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} tensor to numpy: use Tensor.cpu() first")

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} tensor to numpy: use Tensor.cpu() first")

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), on_device(plain(self).detach().clone().requires_grad_(self.requires_grad)))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def is_pretended(value: Any) -> bool:
    return isinstance(value, PretendedTensor)


def plain(value: Tensor) -> Tensor:
    """The same tensor as one of the CPU, with its graph."""
    with torch._C.DisableTorchFunction():
        return value.as_subclass(Tensor)  # type: ignore[arg-type]


def on_device(value: Tensor) -> Tensor:
    """The same tensor as one of DEVICE, with its graph."""
    with torch._C.DisableTorchFunction():
        if value.requires_grad and value.is_leaf:  # a leaf stays one
            return value.detach().as_subclass(PretendedTensor).requires_grad_()  # type: ignore[arg-type]
        return value.as_subclass(PretendedTensor)  # type: ignore[arg-type]


def _target(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """Where the caller asks for the result, when it says."""
    asked = kwargs.get("device")
    if func in _MOVES and asked is None and len(args) > 1:
        other = args[1]
        if isinstance(other, Tensor):
            return DEVICE if is_pretended(other) else CPU
        asked = other if isinstance(other, (str, torch.device)) else None
    if "other" in kwargs and func in _MOVES:
        return DEVICE if is_pretended(kwargs["other"]) else CPU
    return torch.device(asked) if asked is not None else None


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in (Tensor.cpu, Tensor.numpy) or getattr(func, "__name__", "") == "__get__" and func in _OWN:
        if func is Tensor.cpu:
            return plain(args[0]).clone() if is_pretended(args[0]) else args[0]
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    if func is Tensor.__getitem__ and not is_pretended(args[0]):  # an index that is one number is read as a number
        tensors = [value for value in tensors if not (is_pretended(value) and value.ndim == 0)]
    here = any(is_pretended(value) for value in tensors)
    target = _target(func, args, kwargs)
    moves = func in _MOVES
    if here and not moves and func not in _COPIES:
        _refuse_mixture(func, args, tensors)
    if target == DEVICE and (generator := kwargs.get("generator")) is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")
    inner = dict(kwargs)
    if target is not None and "device" in inner:
        inner["device"] = CPU
    if moves and target is not None and len(args) > 1 and not isinstance(args[1], torch.dtype):
        other = args[1]
        args = (args[0], CPU if isinstance(other, (str, torch.device)) else other, *args[2:])
    changes = moves and target is not None and (target == DEVICE) != is_pretended(args[0])
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **inner)
    if changes and any(result is value or result.data_ptr() == value.data_ptr() for value in tensors if value.numel()):
        result = result.clone()  # another device is other memory
    there = target == DEVICE if target is not None else here
    if func in _COPIES or getattr(func, "__name__", "").endswith("_") and not getattr(func, "__name__", "").endswith("__"):
        return args[0]  # written in place
    return tree_map(lambda v: (on_device if there else plain)(v) if isinstance(v, Tensor) and is_pretended(v) != there else v, result)


def _refuse_mixture(func: Any, args: Any, tensors: list[Tensor]) -> None:
    strangers = [value for value in tensors if not is_pretended(value) and value.ndim > 0]
    if func in _INDEXED and is_pretended(args[0]):
        strangers = [value for value in strangers if value.dtype not in (torch.int64, torch.int32, torch.bool)]
    if strangers:
        name = getattr(func, "__name__", str(func))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
                           f"(in {name}, with a CPU tensor of shape {tuple(strangers[0].shape)})")


class _Device(TorchFunctionMode):
    """Sees what no tensor of the device is an argument of: factories with device=DEVICE, and plain tensors moved to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _target(func, args, kwargs) == DEVICE or any(is_pretended(v) for v in tree_flatten((args, kwargs))[0]):
            return _call(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[torch.device]:
    """torch knows DEVICE while it lasts."""
    with _Device():
        yield DEVICE


def move(module: nn.Module, device: torch.device) -> None:
    """Put all weights of a module there, as new parameters (as `nn.Module.to` does where memory cannot be exchanged)."""
    for part in module.modules():
        move_own(part, device)


def move_own(module: nn.Module, device: torch.device) -> None:
    for name, weight in module._parameters.items():
        if weight is not None and weight.device != device:
            module._parameters[name] = nn.Parameter(weight.detach().to(device), requires_grad=weight.requires_grad)
    for name, value in module._buffers.items():
        if value is not None and value.device != device:
            module._buffers[name] = value.to(device)
