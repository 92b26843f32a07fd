"""The matrices in rank space that SSR-Merge measured for a set of LoRAs (arXiv 2606.10617), one for each layer that two of them touch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from jaxtyping import Float
from torch import Tensor

ENDING = ".ssr.safetensors"


@dataclass(frozen=True)
class Measured:
    """What the matrices depend on. loras: the hash of each LoRA's tensors, in order, with its factors by block and of its text part where it has any; prompts: what each was asked for; negative: what
    all of them were, None without guidance; time, shape, kind: of the noisy latents that were evaluated, their number type in words."""

    model: str
    loras: tuple[str, ...]
    prompts: tuple[str, ...]
    negative: str | None
    ridge: float
    time: float
    shape: tuple[int, ...]
    kind: str

    @property
    def key(self) -> str:
        """64 hex digits: equal for what was measured in the same way."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Mixing:
    """matrices: R of each layer by its path, over the ranks of the set's LoRAs in order. error, merged: the squared error of R, and of
    adding the LoRAs up, on what was measured, over all layers, as shares of what each LoRA does alone."""

    matrices: Mapping[str, Float[Tensor, "P P"]]
    error: float
    merged: float
