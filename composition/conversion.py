"""LoRA files made anew without a model's weights: one in another layout, several as one, either with fewer ranks.

Only the names and shapes of a base's layers are needed. What is written is compared with what was to be written, layer by layer, and the
difference is stated: 0 where the factors are the same numbers, else the truncation and the rounding together.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import T5EncoderModel

from composition.fitting import Base, base_of
from composition.loras import compact, products, reader, rejoin, scale
from composition.loras.kinds.full import Full
from composition.loras.kinds.loha import LoHa
from composition.loras.kinds.lokr import LoKr
from composition.loras.kinds.lora import Factors
from composition.loras.layers import Layer, shape
from composition.loras.metadata import line
from composition.loras.nearest import nearest
from composition.loras.reader import LoraFile
from composition.loras.safetensors import load_safely
from composition.loras.writer import Written, write_ranked
from composition.refusal import Refused
from composition.request import Lora, Receipt
from composition.version import __version__

Layout = Literal["diffusers", "kohya"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "kohya")
_ABOUT_FACTORS = ("ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_module", "sshs_model_hash", "sshs_legacy_hash",
                  "modelspec.hash_sha256", "format", "lora_alpha", "network_alpha", "alpha", "r", "use_rslora", scale.ADAPTER,
                  "adapter_config", "peft_config", "lora_config", "preview")  # fmt: skip
_ROUND = 1e-12  # a relative difference below it is that of float64's own rounding


class Left(NamedTuple):
    """squared: |D - LoRA|^2 of the nearest LoRA to an update D. kind: the number type of D's file."""

    squared: float
    kind: torch.dtype


@dataclass(frozen=True)
class Rewritten:
    """A file that was written. ranks: rank to the number of layers that have it. error: |written - wanted| / |wanted|, over all layers as one
    vector; worst: the same of the layer where it is largest, with its name. exact: every number of every update is the same. cut: by whose
    first ranks, of a DyLoRA file. receipts: of the files that were read."""

    file: Path
    layout: Layout
    ranks: Mapping[int, int]
    components: Mapping[str, int]
    error: float
    worst: tuple[str, float]
    cut: bool
    receipts: tuple[Receipt, ...]
    metadata: Mapping[str, str]

    @property
    def exact(self) -> bool:
        return self.error == 0.0

    def line(self) -> str:
        """What was lost, in words."""
        if self.cut:
            return "exact: the first ranks of a DyLoRA file are a LoRA by themselves"
        if self.exact:
            return "exact: every update is the same"
        if self.error < _ROUND:
            return "exact to float64's rounding"
        return f"error {_percent(self.error)} of the updates' length, {_percent(self.worst[1])} in the worst layer ({self.worst[0]:.100})"


def convert(
    file: Path, target: Path, *, to: Layout | None = None, rank: int | None = None, model: str = "", precision: torch.dtype | None = None,
    allow_partial: bool = False,
) -> Rewritten:
    """Write a LoRA file in another layout, and with at most that rank.

    to: None: the file's own, as near as may be. rank: the nearest product of at most that rank in each layer of the target layout, by its
    singular values, also of kinds that are no LoRA and do not ask for the base's weights (LoHa, LoKr, full differences); the first ranks of a
    DyLoRA file. model: whose layers it names (None: the public model of its family). precision: of the
    numbers (as the file has them). Raises Refused for what `reader.read` refuses, for kinds that are no product of two factors where there is no
    rank or none is near without the base's weights, and for numbers that precision cannot hold.
    """
    raw = load_safely(file)
    base = base_of([file], model, [raw])
    lora = reader.read(file, base.components, base.family, allow_partial=allow_partial, raw=raw)
    to = to or ("kohya" if lora.receipt.layout.startswith("kohya") else "diffusers")
    updates: dict[str, dict[str, Factors]] = {}
    left: dict[tuple[str, str], Left] = {}
    for component, inside in lora.factors.items():
        for path, layer in inside.items():
            near = None if rank is None else _near(base, component, path, layer, rank)
            updates.setdefault(component, {})[path] = near[0] if near else _pair(lora, component, path, layer)
            if near:
                left[component, path] = near[1]
    if to == "kohya" and any(component == "transformer" for component, _ in left):
        raise Refused(f"{file.name} is no LoRA, and the nearest one to each layer cannot be written by kohya's names, which join layers: --to diffusers")
    cut = rank is not None and dynamic(raw.metadata) and any(layer.rank > rank for inside in updates.values() for layer in inside.values())
    if cut and rank is not None:
        stated = set(lora.receipt.alpha_from) != {scale.NOBODY}
        updates = {component: {path: _first(layer, rank, stated) for path, layer in inside.items()} for component, inside in updates.items()}
    kept = {name: value for name, value in raw.metadata.items() if name.rpartition(".")[2] not in _ABOUT_FACTORS and name not in _ABOUT_FACTORS}
    kept |= {"converted_from": raw.sha256, "software": f"medley {__version__}"}
    return _written(target, updates, base, to, None if cut else rank, precision, kept, (lora.receipt,), cut=cut, left=left)


def merge(
    loras: Sequence[tuple[Lora, Path]], target: Path, *, to: Layout | None = None, rank: int | None = None, model: str = "",
    precision: torch.dtype | None = None, title: str = "", allow_partial: bool = False,
) -> Rewritten:
    """Write the sum of several LoRAs at their weights as one file: the factors of each layer side by side, with weights and alphas in them.

    Parameters as of `convert`; to None: kohya for UNets, else diffusers. Raises Refused also for LoRAs that are on in some steps, places or
    blocks alone, and where nothing is left.
    """
    for lora, _ in loras:
        if lora.scheduled or lora.region is not None or lora.blocks:
            raise Refused(f"LoRA {lora.name} is on in some steps, places or blocks alone, and the sum of files is on in all: leave out start, end, region and "
                          "blocks (medley export knows blocks)")
    raws = [load_safely(path) for _, path in loras]
    base = base_of([path for _, path in loras], model, raws)
    files = [reader.read(path, base.components, base.family, name=lora.name, allow_partial=allow_partial, raw=raw)
             for (lora, path), raw in zip(loras, raws, strict=True)]
    parts: dict[str, dict[str, list[tuple[Factors, float]]]] = {}
    for (lora, _), file in zip(loras, files, strict=True):
        for component, inside in file.factors.items():
            weight = lora.weight if lora.text_weight is None or not component.startswith("text_encoder") else lora.text_weight
            for path, layer in inside.items() if weight else ():
                parts.setdefault(component, {}).setdefault(path, []).append((_pair(file, component, path, layer), weight))
    updates = {component: {path: _sum(rows) for path, rows in inside.items()} for component, inside in parts.items()}
    precision = precision or reduce(torch.promote_types, (_kind(layer) for file in files for inside in file.factors.values() for layer in inside.values()))
    receipts = tuple(file.receipt for file in files)
    words = dict.fromkeys(word for lora, receipt in zip((lora for lora, _ in loras), receipts, strict=True) for word in lora.triggers or receipt.triggers)
    header = {"title": line(title) or line(" + ".join(receipt.title or receipt.name for receipt in receipts)), "trigger_words": ", ".join(words),
              "base": next((raw.metadata["base"] for raw in raws if "base" in raw.metadata), ""), "method": "sum", "software": f"medley {__version__}"}
    header |= {f"merged_{number}": f"{receipt.sha256} {lora.weight:g}" for number, ((lora, _), receipt) in enumerate(zip(loras, receipts, strict=True))}
    return _written(target, updates, base, to or ("kohya" if "unet" in base.components else "diffusers"), rank, precision,
                    {name: value for name, value in header.items() if value}, receipts)


def dynamic(header: Mapping[str, str]) -> bool:
    """Whether a header says that the file is a DyLoRA (arXiv 2210.07558): the first n ranks of each layer are a LoRA by themselves."""
    return any("dylora" in header.get(name, "").lower() for name in ("ss_network_module", "ss_network_args", "algo"))


def _pair(file: LoraFile, component: str, path: str, layer: Any) -> Factors:
    factors = getattr(layer, "factors", layer)  # the exact LoRA of another kind of update, None where there is none
    if not isinstance(factors, Factors):
        raise Refused(f"{Path(file.receipt.path).name}: {component}.{path} is no product of two factors ({type(layer).__name__}), so it cannot be written as a LoRA"
                      + ("; medley convert --rank N writes the nearest LoRA of that rank" if isinstance(layer, LoHa | LoKr | Full) else ": what it changes depends on the base's weights"))
    return factors


def _near(base: Base, component: str, path: str, layer: Any, rank: int) -> tuple[Factors, Left] | None:
    """The nearest LoRA of an update that is none, in float64; None of one that is, or where none is near without the base's weights."""
    if isinstance(getattr(layer, "factors", layer), Factors):
        return None
    nearby = nearest(layer, shape(cast(Layer, base.components[component].get_submodule(path))), rank)
    if nearby is None:
        return None
    return nearby[0], Left(nearby[1], reduce(torch.promote_types, (_numbers(tensor) for tensor in layer.tensors)))


def _first(layer: Factors, rank: int, stated: bool) -> Factors:
    """The first ranks. alpha stays what the file states, as the trainer's own tool has it; where nobody does, it is the new rank."""
    if layer.rank <= rank:
        return layer
    return Factors(layer.stored_down[:rank], layer.stored_up[:, :rank], layer.alpha if stated else None)


def _sum(rows: Sequence[tuple[Factors, float]]) -> Factors:
    down = torch.cat([layer.stored_down.double() for layer, _ in rows])
    return Factors(down, torch.cat([layer.stored_up.flatten(1).double() * (layer.scale * weight) for layer, weight in rows], dim=1))


def _kind(layer: Any) -> torch.dtype:
    """The number type in which its factors are kept exactly; of numbers of 8 bits, with which nothing can be computed, half precision."""
    return torch.promote_types(_numbers(layer.stored_down), _numbers(layer.stored_up))


def _numbers(tensor: Tensor) -> torch.dtype:
    return torch.float16 if tensor.dtype.itemsize == 1 else tensor.dtype


def _written(
    target: Path, updates: Mapping[str, Mapping[str, Factors]], base: Base, to: Layout, rank: int | None, precision: torch.dtype | None,
    header: Mapping[str, str], receipts: tuple[Receipt, ...], cut: bool = False, left: Mapping[tuple[str, str], Left] = MappingProxyType({}),
) -> Rewritten:
    """left: of layers whose update was no LoRA, what the nearest one leaves out."""
    layers: list[Written] = []
    lost = whole = 0.0
    worst = ("", 0.0)
    for component, inside in updates.items():
        if to == "kohya" and component == "transformer":
            inside = rejoin.authored(base.components[component], inside)
        third = to == "kohya" and component == "text_encoder_2" and isinstance(base.components[component], T5EncoderModel)
        for path, layer in inside.items():
            out = left.get((component, path))
            written = _layer("text_encoder_3" if third else component, path, layer, rank, precision or (out.kind if out else None))
            if written is None:
                continue
            layers.append(written)
            difference, length = products.distance(products.matrices(layer), _matrices(written))
            if out:  # what is left out stands at right angles to what is kept
                difference, length = difference + out.squared, length + out.squared
            lost, whole = lost + difference, whole + length
            worst = max(worst, (f"{component}.{path}", (difference / length) ** 0.5 if length else 0.0), key=lambda row: row[1])
    if not layers:
        raise Refused("these LoRAs change nothing at their weights: there is nothing to write")
    write_ranked(target, _uniform(layers) if to == "kohya" else _bare(layers), header, kohya=to == "kohya")
    ranks, components = Counter(len(layer.down) for layer in layers), Counter(layer.component for layer in layers)
    return Rewritten(target, to, dict(sorted(ranks.items())), dict(components), (lost / whole) ** 0.5 if whole else 0.0, worst, cut, receipts, header)


def _layer(component: str, path: str, layer: Factors, rank: int | None, precision: torch.dtype | None) -> Written | None:
    """A layer as it is to be written; its own numbers where neither the rank nor the number type changes. None without any effect."""
    kind = precision or _kind(layer)
    down, up = layer.stored_down, layer.stored_up.flatten(1)
    if (rank is None or layer.rank <= rank) and torch.promote_types(_kind(layer), kind) == kind:
        return Written(component, path, down.to(kind), up.to(kind), layer.alpha)
    down, up = compact.live(down.double(), up.double() * layer.scale)
    if not len(down):
        return None
    if rank is not None:
        (down, up), _, _ = compact.truncated(down, up, rank)
    down, up = (factor.to(kind) for factor in compact.even(down, up))
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise Refused(f"numbers of {component}.{path} are too large for {str(kind).removeprefix('torch.')}: write the file in float32 (CLI: --precision float32)")
    return Written(component, path, down, up)


def _matrices(layer: Written) -> products.Pair:
    return layer.down.flatten(1).double(), layer.up.double() * layer.scale


def _uniform(layers: Sequence[Written]) -> list[Written]:
    """With one alpha for all where that changes no number (all tools read it), else each with its own."""
    alpha = float(max(len(layer.down) for layer in layers))
    alike = [_times(layer.up, layer.scale * len(layer.down) / alpha) for layer in layers]
    if all(up is not None for up in alike):
        return [layer._replace(up=up, alpha=alpha) for layer, up in zip(layers, alike, strict=True) if up is not None]
    return [layer._replace(alpha=layer.scale * len(layer.down)) for layer in layers]


def _bare(layers: Sequence[Written]) -> list[Written]:
    """Without any alpha where that changes no number, else each with its own."""
    alike = [_times(layer.up, layer.scale) for layer in layers]
    if all(up is not None for up in alike):
        return [layer._replace(up=up, alpha=None) for layer, up in zip(layers, alike, strict=True) if up is not None]
    return list(layers)


def _times(up: Tensor, factor: float) -> Tensor | None:
    """The product in the same number type where every number of it is exact, else None."""
    if factor == 1.0:
        return up
    if abs(math.frexp(factor)[0]) != 0.5:  # no power of two
        return None
    product = (up.double() * factor).to(up.dtype)
    return product if torch.equal(product.double() / factor, up.double()) else None


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
