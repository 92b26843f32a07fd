"""What the base makes of the prompts of a training: each is encoded once, before the first step, and looked up by number."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from composition.backbones.base import Backbone
from composition.sampler import Conditioning

TOGETHER = 32  # prompts encoded in one batch
ROOM = 4 * 2**30  # bytes of a table that may lie where the denoiser computes; a larger one stays in main memory


class Encodings:
    """Row i of every table is prompt i of those given.

    Which prompts are encoded in one batch follows from their order alone, so that a run that goes on reads the very
    numbers of the run that was stopped.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, prompts: Sequence[str], room: int = ROOM) -> None:
        self.device = backbone.device
        self.tables: dict[str, Tensor] = {}  # (prompts, ...)
        for first in range(0, len(prompts), TOGETHER):
            for name, value in backbone.encode(prompts[first : first + TOGETHER], None).values.items():
                if name not in self.tables:
                    whole = value[0, 0].numel() * value.element_size() * len(prompts)
                    where = self.device if whole <= room else torch.device("cpu")
                    self.tables[name] = torch.empty(len(prompts), *value.shape[2:], dtype=value.dtype, device=where)
                self.tables[name][first : first + value.shape[1]] = value[0]

    def rows(self, numbers: Int[Tensor, "n"]) -> Conditioning:
        """(1, n, ...) for these prompts; numbers on the CPU."""
        values = {}
        for name, table in self.tables.items():
            picked = table.index_select(0, numbers.to(table.device, non_blocking=True))
            values[name] = picked.to(self.device, non_blocking=True)[None]
        return Conditioning(values)
