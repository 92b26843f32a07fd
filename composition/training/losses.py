"""The losses of a step as they come: numbers on the device, read when somebody looks."""

from collections.abc import Iterator, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor


class Losses(Mapping[str, float]):
    """The loss of each concept by name. The first look waits for the device; a step whose losses nobody reads does not."""

    def __init__(self, names: Sequence[str], values: Float[Tensor, "K"]) -> None:
        self._names, self._values = tuple(names), values
        self._read: dict[str, float] = {}

    def _floats(self) -> dict[str, float]:
        if not self._read:
            self._read = dict(zip(self._names, self._values.tolist(), strict=True))
        return self._read

    def __getitem__(self, name: str) -> float:
        return self._floats()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
