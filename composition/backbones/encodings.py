"""Encoded prompts, kept within a bound of bytes: what a group of requests need not encode again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LIMIT = 256 * 2**20  # bytes; one of FLUX's prompts takes 4 MiB, one of Stable Diffusion's a fifth of one
FEWEST = 8  # entries that stay whatever their size: the values of the prompt that is being read


class Encodings(dict[Any, Tensor]):
    """By key, on the device they were made on. Above the limit the least recently used are dropped."""

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__()
        self.limit = limit

    def __contains__(self, key: object) -> bool:
        """Asking for one makes it the last to go."""
        if not super().__contains__(key):
            return False
        self[key] = self.pop(key)
        return True

    def update(self, values: Mapping[Any, Tensor]) -> None:  # type: ignore[override]
        super().update(values)
        while len(self) > FEWEST and self.bytes > self.limit:
            self.pop(next(iter(self)))

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.itemsize for value in self.values())
