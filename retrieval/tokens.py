"""Sketches of many LoRAs as arrays in one order of layers, and what training does to them: mixing, layers left out, strengths by block."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrieval.sketch import ORDERS, SIDE, Sketch

_BLOCK = re.compile(r"(?:blocks|layers|attentions|resnets|downsamplers|upsamplers|block|layer)[._]\d+(?=[._])")
_NUMBER = re.compile(r"[._]\d+")


class Layer(NamedTuple):
    """A layer of a base as an encoder sees it. kind: its name without the numbers of its blocks, and its shape: layers of a kind share weights.
    block: the part of its name up to the last of those numbers. shape: (out, in) of its update as a matrix.
    """

    kind: str
    block: str
    shape: tuple[int, int]


def layer(name: str, shape: tuple[int, int]) -> Layer:
    """Of a name as sketches have it: "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"."""
    ends = [match.end() for match in _BLOCK.finditer(name)]
    block = name[: ends[-1]] if ends else name.partition(".")[0]
    return Layer(f"{_NUMBER.sub('', block)}{name[len(block):]} {shape[0]}x{shape[1]}", block, shape)


def layers(sketches: Sequence[Sketch]) -> dict[str, Layer]:
    """Every layer of these, in the order of their names. Raises ValueError where two give a layer different shapes: they are of different bases."""
    shapes: dict[str, tuple[int, int]] = {}
    for sketch in sketches:
        for name, (rows, columns) in zip(sketch.layers, sketch.shapes.tolist(), strict=True):
            if shapes.setdefault(name, (rows, columns)) != (rows, columns):
                raise ValueError(f"{name} is {rows} x {columns} in one LoRA and {shapes[name][0]} x {shapes[name][1]} in another: they are for "
                                 "different bases")
    return {name: layer(name, shapes[name]) for name in sorted(shapes)}


@dataclass(frozen=True, eq=False)
class Tokens:
    """n LoRAs, a token for each of L layers. Where `present` is False the rest is 0.

    units: S / |dW|. logs: log |dW|. entropies: as Sketch has them.
    """

    units: Float[Tensor, "n L kk"]
    logs: Float[Tensor, "n L"]
    entropies: Float[Tensor, "n L 4"]
    present: Bool[Tensor, "n L"]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, rows: Int[Tensor, " m"]) -> "Tokens":
        return Tokens(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, dtype: torch.dtype) -> "Tokens":
        return Tokens(self.units.to(dtype), self.logs.to(dtype), self.entropies.to(dtype), self.present)

    @property
    def shares(self) -> Float[Tensor, "n L"]:
        """log of each layer's share of the LoRA's norm: the same at every weight of the LoRA. 0 where absent."""
        energies = torch.where(self.present, 2 * self.logs, -torch.inf)
        total = energies.logsumexp(1, keepdim=True) / 2
        return torch.where(self.present, self.logs - total, 0.0)

    def mixed(self, other: "Tokens", share: Float[Tensor, " n"]) -> "Tokens":
        """Row by row the sum of two LoRAs, this one at the weight that gives it that share of their energies, the other the rest; 1 for this one alone.

        Sketches add. The norm of a layer's sum follows from its two norms and the inner product as the sketches estimate it. The entropies are
        those of two updates whose singular vectors are orthogonal, as those of LoRAs trained apart nearly are.
        """
        logs = torch.stack([torch.where(part.present, part.shares + weight.log()[:, None] / 2, -torch.inf)
                            for part, weight in ((self, share), (other, 1 - share))])  # fmt: skip
        squares = (2 * logs).exp()
        scales = squares.sqrt()
        products = (self.units * other.units).sum(-1)
        plain = squares.sum(0)
        energy = (plain + 2 * scales[0] * scales[1] * products).clamp_min(0.1 * plain)  # estimates of nearly opposite updates may be below 0
        present = self.present | other.present & (share < 1)[:, None]
        safe = torch.where(present, energy, 1.0)
        units = (self.units * scales[0, ..., None] + other.units * scales[1, ..., None]) / safe.sqrt()[..., None]
        part = squares / torch.where(present, plain, 1.0)
        return Tokens(units, safe.log() / 2, _united(self.entropies, other.entropies, part) * present[..., None], present)

    def thinned(self, share: float, generator: torch.Generator) -> "Tokens":
        """With each layer of each LoRA left out with this probability; of a LoRA that would have none left, all stay."""
        kept = self.present & (torch.rand(self.present.shape, generator=generator) >= share)
        kept = torch.where(kept.any(1, keepdim=True), kept, self.present)
        return Tokens(self.units * kept[..., None], self.logs * kept, self.entropies * kept[..., None], kept)

    def reweighted(self, blocks: Int[Tensor, " L"], spread: float, generator: torch.Generator) -> "Tokens":
        """With the strength of each block of each LoRA multiplied by exp(spread * N(0, 1)), as weights by block do."""
        factors = torch.randn(len(self), int(blocks.max()) + 1, generator=generator)[:, blocks] * spread
        return Tokens(self.units, self.logs + torch.where(self.present, factors.to(self.logs.dtype), 0.0), self.entropies, self.present)


def tokens(sketches: Sequence[Sketch], known: Mapping[str, Layer], side: int = SIDE) -> Tokens:
    """Those of these layers; a layer that is not known, or of another shape, is left out. In float64 if a sketch is. Raises ValueError for a sketch of
    a smaller side.
    """
    sketches = [sketch.shrunk(side) for sketch in sketches]
    dtype = torch.float64 if any(sketch.units.dtype == torch.float64 for sketch in sketches) else torch.float32
    place = {(name, entry.shape): index for index, (name, entry) in enumerate(known.items())}
    n, count = len(sketches), len(known)
    units, logs = torch.zeros(n, count, side * side, dtype=dtype), torch.zeros(n, count, dtype=dtype)
    entropies, present = torch.zeros(n, count, len(ORDERS), dtype=dtype), torch.zeros(n, count, dtype=torch.bool)
    for row, sketch in enumerate(sketches):
        columns = [place.get((name, tuple(shape)), -1) for name, shape in zip(sketch.layers, sketch.shapes.tolist(), strict=True)]
        column = torch.tensor(columns, dtype=torch.long)
        kept, column = column >= 0, column[column >= 0]
        units[row, column] = sketch.units[kept].flatten(1).to(dtype)
        logs[row, column] = sketch.norms[kept].log().to(dtype)
        entropies[row, column] = sketch.entropies[kept].to(dtype)
        present[row, column] = True
    return Tokens(units, logs, entropies, present)


def _united(first: Float[Tensor, "n L 4"], second: Float[Tensor, "n L 4"], part: Float[Tensor, "2 n L"]) -> Float[Tensor, "n L 4"]:
    """The Renyi entropies of two spectra side by side, each with its part of the energy."""
    columns = []
    for index, order in enumerate(ORDERS):
        both = torch.stack([first[..., index], second[..., index]])
        if order == 1.0:
            columns.append((part * both + torch.special.entr(part)).sum(0))
        elif order == float("inf"):
            columns.append(-(part * (-both).exp()).amax(0).clamp_min(1e-12).log())
        else:
            columns.append((part**order * ((1 - order) * both).exp()).sum(0).clamp_min(1e-12).log() / (1 - order))
    return torch.stack(columns, -1)
