"""A denoiser compiled for the rows of a training step, and for those alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Compiled:
    """Inside the context the denoiser is called compiled; previews and the base's own answers, of other shapes, are not.

    The module stays the one it is: its hooks, which hold the adapters, are compiled with it.
    """

    def __init__(self, denoiser: nn.Module, wanted: bool) -> None:
        self.denoiser = denoiser
        self.call: Any = torch.compile(denoiser._call_impl, dynamic=False) if wanted else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.call is None:
            yield
            return
        attributes = vars(self.denoiser)
        before = attributes.get("_compiled_call_impl")
        try:
            attributes["_compiled_call_impl"] = self.call
            yield
        finally:
            attributes.pop("_compiled_call_impl")
            if before is not None:
                attributes["_compiled_call_impl"] = before
