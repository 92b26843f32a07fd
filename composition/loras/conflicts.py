"""What the LoRAs of a set do to each other's layers: strength by block, cosines of their updates by layer, one sentence, and a suggestion.

All of it is computed in rank space (`products`). It is of the weights alone: two LoRAs whose updates are at right angles can still mix in the picture.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from composition.loras import products
from composition.loras.kinds.lora import Factors
from composition.loras.reader import LoraFile

SAME = 0.95  # cosine from which two LoRAs are one
ALIGNED = 0.1  # cosine from which a layer, or two LoRAs, count as pushing one way; of independent ones it is near 0
STRONGER = 3.0  # times as strong, from which one drowns the other out
STEP = 0.05  # of suggested weights

_BLOCK = re.compile(r"(down|up|input|output|middle|mid|double|single|joint|single_transformer|transformer)_blocks?[._]?(\d*)")


@dataclass(frozen=True)
class Strength:
    """Of one LoRA at weight 1. length: |dW| of all layers together; blocks: of each block, by the names that a LoRA's `blocks` have. other:
    layers whose change is no product of two factors, which are not counted."""

    name: str
    length: float
    blocks: Mapping[str, float]
    other: int = 0


@dataclass(frozen=True)
class Overlap:
    """Of two LoRAs. shared: layers that both change, of `layers` that either does. cosine: of their updates in these, as of two vectors.
    alike, against: how many of the layers have a cosine from ALIGNED on, to either side. ratio: how many times as strong the first is there. by_layer:
    the cosines."""

    first: str
    second: str
    shared: int
    layers: int
    cosine: float
    alike: int
    against: int
    ratio: float
    by_layer: Mapping[str, float] = field(repr=False)


@dataclass(frozen=True)
class Conflicts:
    """The report on a set. sentence: what matters most, in plain words. method, weights, why: where to begin."""

    strengths: tuple[Strength, ...]
    overlaps: tuple[Overlap, ...]
    sentence: str
    method: str
    weights: Mapping[str, float]
    why: str


def report(files: Mapping[str, LoraFile]) -> Conflicts:
    """The report on LoRA files read for one base, by name. Raises ValueError for none."""
    if not files:
        raise ValueError("a report needs at least one LoRA")
    layers: dict[str, dict[str, Factors]] = {}
    other = dict.fromkeys(files, 0)
    for name, file in files.items():
        for component, inside in file.factors.items():
            for path, update in inside.items():
                factors = _factors(update)
                if factors is None:
                    other[name] += 1
                else:
                    layers.setdefault(f"{component}.{path}" if component else path, {})[name] = factors
    energy: dict[str, dict[str, float]] = {name: {} for name in files}
    inner: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in combinations(files, 2)}
    for layer, present in layers.items():
        gram = products.gram([products.matrices(factors) for factors in present.values()]).tolist()
        for row, name in enumerate(present):
            energy[name][layer] = max(gram[row][row], 0.0)
            for column, second in enumerate(present):
                if (name, second) in inner:
                    inner[name, second][layer] = gram[row][column]
    families = {name: file.receipt.family for name, file in files.items()}
    strengths = tuple(Strength(name, math.sqrt(sum(energy[name].values())), _by_block(energy[name], families[name]), other[name]) for name in files)
    overlaps = tuple(_overlap(first, second, row, energy[first], energy[second]) for (first, second), row in inner.items())
    method, why = _method(files, overlaps)
    return Conflicts(strengths, overlaps, _sentence(strengths, overlaps), method, _weights(strengths, overlaps), why)


def block(layer: str, family: str = "") -> str:
    """The block of a layer, as in a LoRA's `blocks`: "down.0", "mid", "double.3", "joint.3"; text encoders by their own name, "other" outside."""
    if layer.startswith("text_encoder"):
        return layer.partition(".")[0].replace("_", " ")
    if not (match := _BLOCK.search(layer)):
        return "other"
    kind = {"transformer": "joint" if family == "sd3" else "double", "single_transformer": "single", "middle": "mid"}.get(match[1], match[1])
    return f"{kind}.{match[2]}" if match[2] and kind != "mid" else kind


def _factors(update: Any) -> Factors | None:
    factors = getattr(update, "factors", update)
    return factors if isinstance(factors, Factors) else None


def _by_block(energy: Mapping[str, float], family: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for layer, value in energy.items():
        name = block(layer, family)
        sums[name] = sums.get(name, 0.0) + value
    order = ("text encoder", "down", "input", "mid", "up", "output", "double", "joint", "single", "other")
    place = {name: next(index for index, kind in enumerate(order) if name.startswith(kind)) for name in sums}
    return {name: math.sqrt(sums[name]) for name in sorted(sums, key=lambda name: (place[name], int("0" + "".join(filter(str.isdigit, name)))))}


def _overlap(first: str, second: str, inner: Mapping[str, float], energy: Mapping[str, float], other: Mapping[str, float]) -> Overlap:
    live = [layer for layer in inner if energy[layer] > 0 and other[layer] > 0]
    cosines = {layer: max(-1.0, min(1.0, inner[layer] / math.sqrt(energy[layer]) / math.sqrt(other[layer]))) for layer in live}
    lengths = [math.sqrt(sum(each[layer] for layer in live)) for each in (energy, other)]
    cosine = sum(inner[layer] for layer in live) / lengths[0] / lengths[1] if live else 0.0
    return Overlap(
        first, second, len(live), sum(1 for layer in energy.keys() | other.keys() if energy.get(layer) or other.get(layer)), max(-1.0, min(1.0, cosine)),
        sum(value >= ALIGNED for value in cosines.values()), sum(value <= -ALIGNED for value in cosines.values()),
        lengths[0] / lengths[1] if live else 1.0, cosines)


def _sentence(strengths: Sequence[Strength], overlaps: Sequence[Overlap]) -> str:
    if apart := [strength.name for strength in strengths if not strength.length and strength.other]:
        return f"{' and '.join(apart)}: updates of this kind are no product of two factors, and are not compared."
    if idle := [strength.name for strength in strengths if not strength.length]:
        return f"{' and '.join(idle)} {'changes' if len(idle) == 1 else 'change'} nothing that can be compared."
    if not overlaps:
        return ""
    if not any(overlap.shared for overlap in overlaps):
        return "They change different layers: in the weights none takes anything from another."
    near = max(overlaps, key=lambda overlap: overlap.cosine)
    against = min(overlaps, key=lambda overlap: overlap.cosine)
    strong = max(overlaps, key=lambda overlap: max(overlap.ratio, 1 / overlap.ratio))
    if near.cosine >= SAME:
        return f"{near.first} and {near.second} are nearly the same LoRA (cosine {near.cosine:.2f}): use one of them."
    if near.cosine >= ALIGNED:
        words = (f"{near.first} and {near.second} push the same way in {near.alike} of the {near.shared} layers that they share (cosine {near.cosine:.2f}): "
                 "added up they do more than either was trained to")
    elif against.cosine <= -ALIGNED:
        words = (f"{against.first} and {against.second} push against each other in {against.against} of the {against.shared} layers that they share (cosine "
                 f"{against.cosine:.2f}): added up each takes away from the other")
    else:
        low, high = (round(overlap.cosine, 2) + 0.0 for overlap in (against, near))
        words = (f"Their updates are nearly at right angles (cosine {low:.2f}{f' to {high:.2f}' if low != high else ''}): in the weights they do not disturb each other, and what "
                 "mixes is the picture")
    ratio = max(strong.ratio, 1 / strong.ratio)
    if ratio >= STRONGER:
        first, second = (strong.first, strong.second) if strong.ratio > 1 else (strong.second, strong.first)
        words += f"; {first} is {ratio:.1f} times as strong as {second}, and may drown it out"
    return words + "."


def _method(files: Mapping[str, LoraFile], overlaps: Sequence[Overlap]) -> tuple[str, str]:
    """Where to begin, by what docs/results.md measured on the bundled models."""
    receipts = [file.receipt for file in files.values()]
    kinds = [receipt.category for receipt in receipts]
    if len(files) == 1 or any(overlap.cosine >= SAME for overlap in overlaps):
        return "merge", "one LoRA is the same by every method"
    if len(files) == 2 and sorted(kind == "style" for kind in kinds) == [False, True] and all(kinds):
        return "np-lora", "a subject in a style: the style is kept out of the subject's directions"
    if sum(kind in ("character", "object", "clothing") for kind in kinds) >= 2 or len(files) > 2 and sum(bool(receipt.triggers) for receipt in receipts) >= 2:
        return "clora-fast", "several concepts: each subject is kept to its own place, places and styles are everywhere"
    if any(abs(overlap.cosine) >= ALIGNED for overlap in overlaps):
        return "merge", "their updates share directions, which the lower weights make up for; ssr, which takes them apart, was not ahead on the bundled models"
    return "merge", "nothing in the weights speaks against the plain sum"


def _weights(strengths: Sequence[Strength], overlaps: Sequence[Overlap]) -> dict[str, float]:
    """No LoRA more than STRONGER times as strong as the weakest; where two are aligned, the sum of those no longer than at right angles."""
    weakest = min((strength.length for strength in strengths if strength.length), default=0.0)
    aligned = max((overlap.cosine for overlap in overlaps if overlap.cosine >= ALIGNED), default=0.0)
    weights = {}
    for strength in strengths:
        weight = min(1.0, STRONGER * weakest / strength.length) if strength.length else 1.0
        weights[strength.name] = max(STEP, STEP * math.floor(weight / math.sqrt(1 + aligned) / STEP + 1e-9))
    for overlap in overlaps:
        if overlap.cosine >= SAME and weights.get(overlap.first):
            weights[overlap.second] = 0.0
    if sum(map(bool, weights.values())) == 1:
        weights = {name: 1.0 if weight else 0.0 for name, weight in weights.items()}
    return {name: round(weight, 2) for name, weight in weights.items()}
