"""A base on which something else is trained: it neither learns nor drops out, and computes its activations a second time if asked to."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from composition.hooks.attention import frozen


@contextmanager
def still(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The base neither learns nor drops out while the context lasts."""
    modules = list(modules)
    modes = [(module, module.training) for model in modules for module in model.modules()]
    try:
        for model in modules:
            model.eval()
        with frozen(modules):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def recomputing(denoiser: nn.Module, function: Callable[..., object] | None) -> Iterator[None]:
    """With a function, diffusers' gradient checkpointing by it while the context lasts; as before afterwards."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(module, {n: vars(module)[n] for n in names if n in vars(module)}) for module in denoiser.modules()
              if hasattr(module, "gradient_checkpointing")] if function else []  # fmt: skip
    try:
        for module, _ in before:
            vars(module).update(gradient_checkpointing=True, _gradient_checkpointing_func=function)
        yield
    finally:
        for module, values in before:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(values)
