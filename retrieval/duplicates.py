"""Near-duplicates: LoRA files whose updates point the same way, by their exact inner products. A strength, a header, another rank or dtype of the
same LoRA do not hide it; another epoch of the same training is near, too.

Files of one spelling of layers are compared: what diffusers and what FLUX's own code call a layer has different names and shapes.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from composition.loras import reader
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import load_safely
from composition.refusal import Cancelled, Refused
from retrieval import singular
from retrieval.cards import Card

LEAST = 0.95  # cosine from which two files are near-duplicates
MARGIN = 0.15  # by how much an estimate from sketches of 8 x 8 a layer may be too small: five of its standard deviations over 36 layers
MOST_PAIRS = 20_000
HELD = 2 * 2**30  # bytes of factors held in memory

Pair = tuple[str, str]  # of tensor_sha256, the smaller first


class Near(NamedTuple):
    """Two files, and the cosine of their updates."""

    first: Card
    second: Card
    cosine: float


def near(
    cards: Sequence[Card], least: float = LEAST, *, pairs: Sequence[Pair] | None = None, cancel: threading.Event | None = None,
) -> list[Near]:
    """The pairs of different tensors with a cosine of at least that, the nearest first. Files are read whole; those that cannot be are passed over.

    pairs: which to compare, by tensor_sha256 (`likely`); None: all of a family. Raises Refused for more than MOST_PAIRS, Cancelled when cancelled.
    """
    by_tensors = {card.tensor_sha256: card for card in reversed(cards) if card.tensor_sha256 and card.usable and card.path.is_file()}
    chosen = sorted(_alike(by_tensors) if pairs is None else {pair for pair in map(_ordered, pairs) if set(pair) <= by_tensors.keys()})
    if len(chosen) > MOST_PAIRS:
        raise Refused(f"{len(by_tensors):,} LoRA files make {len(chosen):,} pairs, and at most {MOST_PAIRS:,} are compared number by number: choose fewer files, "
                      "or the pairs whose sketches are alike")
    files, rows = _Files(), []
    for first, second in chosen:
        if cancel is not None and cancel.is_set():
            raise Cancelled("the comparison of LoRA files was stopped")
        cosine = singular.cosine(files.factors(by_tensors[first]), files.factors(by_tensors[second]))
        if cosine >= least:
            rows.append(Near(by_tensors[first], by_tensors[second], cosine))
    return sorted(rows, key=lambda row: -row.cosine)


def likely(sketches: Mapping[str, Mapping[str, Float[Tensor, "k k"]]], least: float = LEAST, margin: float = MARGIN) -> list[Pair]:
    """The pairs whose updates may have a cosine of at least that, by their sketches: tensor_sha256 to (layer to sketch of its update, linear in it)."""
    names = sorted(sketches)
    layers: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        for layer in sketches[name]:
            layers.setdefault(layer, []).append(index)
    products = torch.zeros(len(names), len(names))
    for layer, rows in layers.items():
        matrix = torch.stack([sketches[names[index]][layer].flatten().float() for index in rows])
        where = torch.tensor(rows)
        products[where[:, None], where] += matrix @ matrix.mT
    norms = products.diagonal().clamp_min(1e-30).sqrt()
    alike = (products / norms / norms[:, None]).triu(1) >= least - margin
    return [(names[first], names[second]) for first, second in alike.nonzero().tolist()]


def _alike(cards: Mapping[str, Card]) -> Iterator[Pair]:
    families: dict[str, list[str]] = {}
    for tensors, card in sorted(cards.items()):
        families.setdefault(card.family, []).append(tensors)
    for members in families.values():
        yield from combinations(members, 2)


def _ordered(pair: Pair) -> Pair:
    return (min(pair), max(pair))


class _Files:
    """The factors of files by the hash of their tensors, those read last held in memory up to HELD bytes."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[Mapping[str, Factors], int]] = OrderedDict()
        self._size = 0

    def factors(self, card: Card) -> Mapping[str, Factors]:
        """None of a file that has changed since it was catalogued, or cannot be read any more."""
        if card.tensor_sha256 in self._held:
            self._held.move_to_end(card.tensor_sha256)
            return self._held[card.tensor_sha256][0]
        factors, size = {}, 0
        with suppress(Refused):
            raw = load_safely(card.path)
            if raw.tensor_sha256 == card.tensor_sha256:
                factors, size = reader.unplaced(card.path, raw), sum(tensor.nbytes for tensor in raw.tensors.values())
        self._held[card.tensor_sha256] = factors, size
        self._size += size
        while self._size > HELD and len(self._held) > 2:
            _, (_, gone) = self._held.popitem(last=False)
            self._size -= gone
        return factors
