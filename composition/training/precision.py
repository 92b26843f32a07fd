"""Training in bfloat16 without casting the base anew for every layer and step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class HalfBase:
    """The weights of the denoiser's linear layers and convolutions as autocast would cast them: made once, lent step by step.

    Autocast keeps its own copies only of weights that ask for a gradient, and a base that does not learn asks for none.
    Between steps the layers have their own weights, the very tensors: whoever draws a preview sees the base as it is.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device, wanted: bool) -> None:
        layers = [layer for layer in denoiser.modules() if wanted and type(layer) in (nn.Linear, nn.Conv2d)]
        own = {id(weight): weight for layer in layers for weight in layer.parameters(recurse=False)
               if type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == device.type}  # fmt: skip
        self.lent = [(weight, weight.data, weight.data.bfloat16()) for weight in own.values()]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The halves are in the layers. The backward pass belongs inside: it reads them again."""
        try:
            for weight, _, half in self.lent:
                weight.data = half
            yield
        finally:
            self.restore()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The layers have their own weights afterwards, wherever a step was interrupted."""
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """The layers have their own weights."""
        for weight, whole, _ in self.lent:
            weight.data = whole
