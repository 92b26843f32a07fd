"""A LoRA file -> its factors by layer of a base, and the receipt of what was applied and what was not, and why.

Every tensor of the raw file is either applied or listed under a reason; less than all of them is refused unless the
caller allows it. Only alpha / rank is folded into the factors, here, once; a weight is always a gate (`adapters`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from composition.loras import family as lora_family
from composition.loras import layers as layer_map
from composition.loras import metadata
from composition.loras.fused import Part
from composition.loras.keys import TWICE, Module, modules
from composition.loras.safetensors import SafeFile, load_safely
from composition.request import Receipt, Refused

NO_BASE = "no base model given"
NO_LAYER = "no such layer in this base"
NO_PAIR = "incomplete pair (down without up, or up without down)"
NO_FLOAT = "not stored as floating-point numbers"


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's LoRA: the update of its weight is up @ down (alpha / rank is folded into up).

    down: (r, in) for a linear, (r, in, kh, kw) for a convolution. up: (out, r) or (out, r, 1, 1). Both on the CPU,
    contiguous, float32 (float64 where the file has float64). alpha is as the file says, or what makes
    alpha / rank its factor where the file scales otherwise.
    """

    down: Tensor
    up: Tensor
    rank: int
    alpha: float


@dataclass(frozen=True, eq=False)
class LoraFile:
    """factors: component ("unet", "text_encoder", "text_encoder_2") to module path in that component to Factors."""

    factors: Mapping[str, Mapping[str, Factors]]
    receipt: Receipt


def read(
    path: Path,
    components: Mapping[str, nn.Module],
    family: str,
    *,
    name: str = "",
    allow_partial: bool = False,
) -> LoraFile:
    """Read a LoRA file for a base.

    components: "unet" or "transformer" and the text encoders of the base, by name (on any device, "meta" too). family: "sd"
    (one text encoder: SD 1.x, 2.x and small models of that shape), "sdxl", "sd3" or "flux". name: what the receipt calls it (default: the
    file's stem). Raises Refused for a file that is unsafe, broken, made for another kind of base, of which nothing
    fits, or, without allow_partial, of which something does not fit.
    """
    path = Path(path)
    raw = load_safely(path)
    found, ignored = modules(raw.tensors)
    found = [_settled(module, components) for module in found]
    settings = metadata.adapter(raw.metadata, path.name)
    made_for = lora_family.detect(found, raw.tensors)
    foreign = lora_family.foreign(made_for, components, family)
    names = {part: _names(part, module, found) for part, module in components.items()}
    layers = {part: layer_map.layers(module) for part, module in components.items()}
    factors: dict[str, dict[str, Factors]] = {}
    applied: Counter[str] = Counter()
    places = [names.get(module.component, {}).get(layer_map.flat(module.module), ()) for module in found]
    claims = Counter((module.component, part.path) for module, parts in zip(found, places, strict=True) for part in parts)
    for module, parts in zip(found, places, strict=True):
        reason = _obstacle(module, raw.tensors, components, parts)
        if not reason and any(claims[module.component, part.path] > 1 for part in parts):
            reason = TWICE  # nothing says which of them is meant
        if reason:
            ignored.setdefault(reason, []).extend(module.all)
            continue
        alpha = _alpha(module, raw.tensors, settings, path.name)
        try:
            made = _factors(module, raw.tensors, layers[module.component], parts, alpha)
        except ValueError as error:
            raise Refused(f"{path.name}: {foreign or f'{module.component}.{parts[0].path}: {error}'}") from None
        factors.setdefault(module.component, {}).update(made)
        applied[module.component] += len(module.all)
    if ignored and foreign:
        raise Refused(f"{path.name}: {foreign}")
    if made_for.family == "unknown" and factors:
        made_for = made_for._replace(family=family)
    factors = {  # in the base's own order, whatever the file's
        part: {where: factors[part][where] for where in layers[part] if where in factors[part]}
        for part in components
        if part in factors
    }
    flat = {f"{part}.{where}": one for part, inside in factors.items() for where, one in inside.items()}
    receipt = _receipt(
        path, name, raw, found, made_for.family,
        components={part: {"tensors": applied[part], "modules": len(inside)} for part, inside in factors.items()},
        ignored=ignored,
        no_effect=tuple(where for where, one in flat.items() if not (one.up.any() and one.down.any())),
        ranks=Counter(one.rank for one in flat.values()),
        alphas=Counter(one.alpha for one in flat.values()),
    )
    _covered(receipt, path.name, lora_family.base(components, family), allow_partial)
    return LoraFile(factors, receipt)


def inspect(path: Path) -> Receipt:
    """What a LoRA file is, without a base: nothing is applied, and every key is ignored because no base was given.

    Ranks, alphas and modules without effect (by their names in the file) are of its complete pairs. Raises Refused
    for a file that is unsafe or broken.
    """
    path = Path(path)
    raw = load_safely(path)
    found, _ = modules(raw.tensors)
    settings = metadata.adapter(raw.metadata, path.name)
    pairs = [module for module in found if _pair(module, raw.tensors)]
    alphas = [_alpha(module, raw.tensors, settings, path.name) for module in pairs]
    no_effect = []
    for module, alpha in zip(pairs, alphas, strict=True):
        if not alpha or not all(raw.tensors[module.keys[role]].float().any() for role in ("down", "up")):
            no_effect.append(f"{module.component}.{module.module}")
    return _receipt(
        path, "", raw, found, lora_family.detect(found, raw.tensors).family,
        components={},
        ignored={NO_BASE: sorted(raw.tensors)},
        no_effect=tuple(no_effect),
        ranks=Counter(raw.tensors[module.keys["down"]].shape[0] for module in pairs),
        alphas=Counter(alphas),
    )


def _settled(module: Module, components: Mapping[str, nn.Module]) -> Module:
    """With T5, which files call the third text encoder, where this base has it: FLUX's is its second."""
    third = module.component == "text_encoder_3" and "text_encoder_3" not in components and "transformer" in components
    return replace(module, component="text_encoder_2") if third else module


def _names(component: str, module: nn.Module, found: Sequence[Module]) -> dict[str, tuple[Part, ...]]:
    count = sum(one.component == component and one.layout == "first-generation" for one in found)
    numbered = layer_map.numbered(component, module, count) if count else {}
    return layer_map.parts(component, module) | {number: (Part(path),) for number, path in numbered.items()}


def _pair(module: Module, tensors: Mapping[str, Tensor]) -> bool:
    """True when it has a down and an up in floating point, with at least two dimensions."""
    pair = [tensors[module.keys[role]] for role in ("down", "up") if role in module.keys]
    return len(pair) == 2 and all(one.dtype.is_floating_point and one.ndim >= 2 for one in pair)


def _obstacle(
    module: Module, tensors: Mapping[str, Tensor], components: Mapping[str, nn.Module], where: Sequence[Part]
) -> str:
    """Why a module cannot be applied at `where` (empty: the base has no such layer), or ""."""
    if module.blocked:
        return module.blocked
    if not {"down", "up"} <= set(module.keys):
        return NO_PAIR
    if not all(tensors[key].dtype.is_floating_point for role, key in module.keys.items() if role != "alpha"):
        return NO_FLOAT
    if module.component and module.component not in components:
        return f"this base has no {module.component}"
    return "" if where else NO_LAYER


def _alpha(module: Module, tensors: Mapping[str, Tensor], settings: Mapping[str, object], file: str) -> float:
    """alpha of a pair: its own tensor, else the adapter settings in the header, else its rank."""
    rank = tensors[module.keys["down"]].shape[0]
    if "alpha" not in module.keys:
        return metadata.alpha(settings, module.component, module.module, rank, file)
    stored = tensors[module.keys["alpha"]]
    if stored.numel() != 1 or stored.is_complex():
        raise Refused(f"{file}: {module.keys['alpha']!r} is not one number but of shape {tuple(stored.shape)}")
    return float(stored.item())


def _factors(
    module: Module, tensors: Mapping[str, Tensor], layers: Mapping[str, layer_map.Layer], parts: Sequence[Part], alpha: float
) -> dict[str, Factors]:
    """By path, the factors in the shape each layer has. Raises ValueError when they do not fit.

    A linear and a 1x1 convolution are the same thing written as 2-D or 4-D: each is taken for the other.
    """
    down, up = tensors[module.keys["down"]], tensors[module.keys["up"]]
    if down.ndim < 2 or not down.numel() or not up.numel():
        raise ValueError(f"its factors {tuple(up.shape)} and {tuple(down.shape)} are empty or no matrices")
    rank = down.shape[0]
    shapes = [layer_map.shape(layers[part.path]) for part in parts]
    _, inputs, *kernel = shapes[0]
    outputs = sum(shape[0] for shape in shapes)
    expected = ((rank, inputs, *kernel), (outputs, rank, *(1 for _ in kernel)))
    fitted = []
    for given, wanted in zip((down, up), expected, strict=True):
        if _bare(tuple(given.shape)) != _bare(wanted):
            raise ValueError(
                f"its factors {tuple(up.shape)} x {tuple(down.shape)} do not fit a layer of shape "
                f"{(outputs, inputs, *kernel)} (out, in): it was made for a model of another width"
            )
        fitted.append(given.reshape(wanted))
    dtype = torch.float64 if torch.float64 in (down.dtype, up.dtype) else torch.float32
    down, up = (one.to(dtype, copy=True).contiguous() for one in fitted)
    up *= alpha / rank
    if not torch.isfinite(up).all():
        raise ValueError(f"alpha {alpha} makes its numbers infinite")
    return {part.path: Factors(down, part.rows(up).contiguous(), rank, alpha) for part in parts}


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _receipt(
    path: Path, name: str, raw: SafeFile, found: Sequence[Module], family: str, *,
    components: Mapping[str, Mapping[str, int]], ignored: Mapping[str, Sequence[str]],
    no_effect: tuple[str, ...], ranks: Mapping[int, int], alphas: Mapping[float, int],
) -> Receipt:
    """The receipt, with the law checked: every tensor of the file is applied or ignored."""
    applied = sum(part["tensors"] for part in components.values())
    left_out = sum(len(keys) for keys in ignored.values())
    if applied + left_out != len(raw.tensors):
        raise AssertionError(f"{path.name}: {applied} applied + {left_out} ignored != {len(raw.tensors)} tensors")
    layouts = Counter(module.layout for module in found).most_common()
    return Receipt(
        name=name or path.stem, path=str(path), sha256=raw.sha256, tensor_sha256=raw.tensor_sha256, family=family,
        layout=" + ".join(layout for layout, _ in layouts) or "unknown",
        tensors=len(raw.tensors), applied=applied, components=components,
        ignored={reason: tuple(sorted(keys)) for reason, keys in ignored.items()},
        no_effect=no_effect, ranks=dict(ranks), alphas=dict(alphas),
        title=metadata.title(raw.metadata), category=metadata.category(raw.metadata),
        triggers=metadata.triggers(raw.metadata), metadata=dict(raw.metadata), data_sha256=raw.data_sha256,
    )


def _covered(receipt: Receipt, file: str, base: str, allow_partial: bool) -> None:
    """Raises Refused when nothing, or without allow_partial when not all, of the file was applied."""
    reasons = "; ".join(f"{len(keys)}: {reason} (as {keys[0]!r:.120})" for reason, keys in receipt.ignored.items())
    if not receipt.applied:
        raise Refused(f"{file}: none of its {receipt.tensors} tensors can be applied to this base ({base}): {reasons}")
    if receipt.ignored and not allow_partial:
        left = receipt.tensors - receipt.applied
        raise Refused(f"{file}: {left} of its {receipt.tensors} tensors cannot be applied: {reasons}. "
                      "To use the rest, set allow_partial (CLI: --allow-partial)")
