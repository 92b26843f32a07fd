"""Learned probes: what each layer's update answers to a learned input, in place of a fixed sketch of it (AutoLoRA, arXiv 2508.02107).

t = q dW^T = (q A^T) B^T: exact, whatever the factors, but computed from the factors themselves at every step of training. An option to compare with
sketches, which are 50 to 1000 times smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from composition.loras.kinds.lora import Factors
from retrieval.sketch import sketched
from retrieval.tokens import Layer, Tokens, tokens


@dataclass(frozen=True, eq=False)
class Updates:
    """n LoRAs as factors over L layers: by kind of layer, (n, layers of the kind, ...) with ranks filled up with zeros; up over the update's norm.

    figures: their tokens. places: the layers of each kind, by number.
    """

    downs: Mapping[str, Float[Tensor, "n l r in"]]
    ups: Mapping[str, Float[Tensor, "n l out r"]]
    figures: Tokens
    places: Mapping[str, Sequence[int]]

    def __len__(self) -> int:
        return len(self.figures)

    def __getitem__(self, rows: Int[Tensor, " m"]) -> "Updates":
        downs, ups = ({kind: part[rows] for kind, part in parts.items()} for parts in (self.downs, self.ups))
        return Updates(downs, ups, self.figures[rows], self.places)

    @property
    def present(self) -> Bool[Tensor, "n L"]:
        return self.figures.present

    @property
    def entropies(self) -> Float[Tensor, "n L 4"]:
        return self.figures.entropies

    @property
    def shares(self) -> Float[Tensor, "n L"]:
        return self.figures.shares

    def mixed(self, other: "Updates", share: Float[Tensor, " n"]) -> "Updates":
        """As that of Tokens: the ranks of both side by side."""
        figures = self.figures.mixed(other.figures, share)
        weights = [torch.where(part.present, part.shares + weight.log()[:, None] / 2 - figures.logs, -torch.inf).exp()
                   for part, weight in ((self, share), (other, 1 - share))]  # fmt: skip
        downs = {kind: torch.cat([self.downs[kind], other.downs[kind]], 2) for kind in self.downs}
        ups = {kind: torch.cat([part.ups[kind] * weight[:, self.places[kind], None, None] for part, weight in zip((self, other), weights, strict=True)], 3)
               for kind in self.ups}
        return Updates(downs, ups, figures, self.places)

    def thinned(self, share: float, generator: torch.Generator) -> "Updates":
        return replace(self, figures=self.figures.thinned(share, generator))

    def reweighted(self, blocks: Int[Tensor, " L"], spread: float, generator: torch.Generator) -> "Updates":
        return replace(self, figures=self.figures.reweighted(blocks, spread, generator))


class Probes(nn.Module):
    """One learned input a layer and one map of the answers a kind of layer."""

    def __init__(self, layers: Sequence[Layer], width: int) -> None:
        super().__init__()
        self.kinds = of_kinds(layers)
        shapes = {entry.kind: entry.shape for entry in layers}
        self.inputs = nn.ParameterList(torch.randn(len(places), shapes[kind][1]) for kind, places in self.kinds.items())
        self.maps = nn.ParameterList(torch.randn(shapes[kind][0], width) / shapes[kind][0] ** 0.5 for kind in self.kinds)

    def forward(self, batch: Updates) -> Float[Tensor, "n L w"]:
        answers, order = [], []
        for (kind, places), inputs, weights in zip(self.kinds.items(), self.inputs, self.maps, strict=True):
            ranks = torch.einsum("li,nlri->nlr", inputs, batch.downs[kind].to(inputs.dtype))
            answers.append(torch.einsum("nlr,nlor->nlo", ranks, batch.ups[kind].to(inputs.dtype)) * weights.shape[0] ** 0.5 @ weights)
            order += places
        return torch.cat(answers, 1)[:, torch.tensor(order).argsort()]


def updates(loras: Sequence[Mapping[str, Factors]], known: Mapping[str, Layer]) -> Updates:
    """Those of these layers, of what `sketch.named` gives. In float64 if a layer is stored so."""
    figures = tokens([sketched(lora) for lora in loras], known)
    names, dtype = list(known), figures.units.dtype
    rank = max((layer.rank for lora in loras for layer in lora.values()), default=1)
    places = of_kinds(list(known.values()))
    downs = {kind: torch.zeros(len(loras), len(inside), rank, known[names[inside[0]]].shape[1], dtype=dtype) for kind, inside in places.items()}
    ups = {kind: torch.zeros(len(loras), len(inside), known[names[inside[0]]].shape[0], rank, dtype=dtype) for kind, inside in places.items()}
    for row, lora in enumerate(loras):
        for kind, inside in places.items():
            for column, index in enumerate(inside):
                if figures.present[row, index]:
                    layer = lora[names[index]]
                    downs[kind][row, column, : layer.rank] = layer.down.flatten(1).to(dtype)
                    ups[kind][row, column, :, : layer.rank] = layer.up.flatten(1).to(dtype) / figures.logs[row, index].exp()
    return Updates(downs, ups, figures, places)


def of_kinds(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Kind to the numbers of its layers."""
    kinds: dict[str, list[int]] = {}
    for index, entry in enumerate(layers):
        kinds.setdefault(entry.kind, []).append(index)
    return kinds
