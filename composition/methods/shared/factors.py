"""Which adapters and ranks of a layer's stack are those of a run's LoRAs."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from composition.adapters.stack import Stack
from composition.run import Run


def adapters_of(run: Run, names: Sequence[str]) -> list[int]:
    """The numbers of these LoRAs among the adapters."""
    return [run.adapters.names.index(name) for name in names]


def ranks_of(layer: Stack, adapters: Sequence[int]) -> Int[Tensor, "p"]:
    """The ranks of these adapters in a layer."""
    return torch.tensor([rank for k in adapters for rank in range(*layer.spans[k])], dtype=torch.long)
