"""A LoRA file -> its updates by layer of a base, and the receipt of what was applied and what was not, and why.

Every tensor of the raw file is either applied or listed under a reason; less than all of them is refused unless the
caller allows it. Updates stay as they are stored, of whatever kind (`kinds`), with alpha beside them; a weight is always a gate (`adapters`).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from composition.loras import controls, metadata, scale, speed, suspicious
from composition.loras import family as lora_family
from composition.loras import layers as layer_map
from composition.loras.fused import Part
from composition.loras.keys import TWICE, Module, modules
from composition.loras.kinds import read as kinds
from composition.loras.kinds.base import Update
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import SafeFile, load_header, load_safely
from composition.refusal import Refused
from composition.request import ALWAYS_ON, Receipt

NO_BASE = "no base model given"
NO_LAYER = "no such layer in this base"
NO_NAME = "a layer's name in a spelling that is not known"
NO_PAIR = "incomplete pair (down without up, or up without down)"
NO_WHOLE = "parts of an update of which some are missing, or which do not go together"
NO_FLOAT = "not stored as floating-point numbers"
_NO_NUMBERS = frozenset({"alpha", "on_input", "scaled_oft"})  # roles that are no part of an update's numbers


@dataclass(frozen=True, eq=False)
class LoraFile:
    """factors: component ("unet", "text_encoder", "text_encoder_2") to module path in that component to its update: `Factors` of a LoRA, or
    another kind (`kinds.base.Update`), of which `update.factors` is an exact LoRA where one is small.

    outside: what beside the file's own bytes they come from, "" for nothing: files of equal bytes with equal `outside` are alike.
    """

    factors: Mapping[str, Mapping[str, Update]]
    receipt: Receipt
    outside: str = ""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of main memory that its updates hold; memory that several share counts once."""
        stored = [tensor for inside in self.factors.values() for update in inside.values() for tensor in update.tensors]
        return sum({(storage := tensor.untyped_storage()).data_ptr(): storage.nbytes() for tensor in stored}.values())


def read(
    path: Path,
    components: Mapping[str, nn.Module],
    family: str,
    *,
    name: str = "",
    allow_partial: bool = False,
    raw: SafeFile | None = None,
) -> LoraFile:
    """Read a LoRA file for a base.

    components: "unet" or "transformer" and the text encoders of the base, by name (on any device, "meta" too). family: "sd"
    (one text encoder: SD 1.x, 2.x and small models of that shape), "sdxl", "sd3" or "flux". name: what the receipt calls it (default: the
    file's stem). raw: the file, where it was read already. Raises Refused for a file that is unsafe, broken, made for another kind of base, of which nothing
    fits, or, without allow_partial, of which something does not fit.
    """
    path = Path(path)
    raw = raw or load_safely(path)
    if controls.of_names(raw.tensors).kind == "controlnet":
        raise Refused(f"{path.name} is a ControlNet, which goes with a picture: --control {path}=PICTURE")
    updates, ignored = modules(raw.tensors)
    updates = [_settled(module, components) for module in updates]
    stated = scale.statements(path, raw.metadata)
    origin = lora_family.detect(updates, raw.tensors)
    foreign = lora_family.foreign(origin, components, family)
    names = {part: _names(part, module, updates) for part, module in components.items()}
    norms = {part: layer_map.norms(module) for part, module in components.items()}
    layers = {part: {**layer_map.layers(module), **norms[part]} for part, module in components.items()}
    normed = {part: layer_map.names(part, module, norms[part]) for part, module in components.items()}
    factors: dict[str, dict[str, Update]] = {}
    applied: Counter[str] = Counter()
    kinds_of: Counter[str] = Counter()
    alphas: Counter[float] = Counter()
    places = [_places(module, names.get(module.component, {}), normed.get(module.component, {})) for module in updates]
    claims = Counter((module.component, part.path) for module, parts in zip(updates, places, strict=True) for part in parts)
    known = {part: (layer_map.words(module), names[part].keys()) for part, module in components.items()} if not all(places) else {}
    sources: list[tuple[scale.Alpha, ...]] = []
    sizes: list[suspicious.Sizes] = []
    for module, parts in zip(updates, places, strict=True):
        reason = _obstacle(module, raw.tensors, components, parts, known)
        if not reason and any(claims[module.component, part.path] > 1 for part in parts):
            reason = TWICE  # nothing says which of them is meant
        if reason:
            ignored.setdefault(reason, []).extend(module.all)
            continue
        roles = _roles(module, raw.tensors)
        stating = _alphas(module, raw.tensors, stated, path.name)
        alpha = stating[0].value if stating else None
        try:
            updated = kinds.fitted(roles, alpha, layers[module.component], parts, scale.rotation(stated, module.component) if "oft_R" in roles else None)
        except ValueError as error:
            raise Refused(f"{path.name}: {foreign or f'{module.component}.{parts[0].path}: {error}'}") from None
        factors.setdefault(module.component, {}).update(updated)
        if alpha is not None:
            sources.append(stating)
            alphas[alpha] += len(updated)
        sizes.append(_sizes(module, raw, alpha))
        kinds_of[kinds.word(roles)] += 1
        applied[module.component] += len(module.all)
    if ignored and foreign:
        raise Refused(f"{path.name}: {foreign}")
    if origin.family == "unknown" and factors:
        origin = origin._replace(family=family)
    factors = {  # in the base's own order, whatever the file's
        part: {where: factors[part][where] for where in layers[part] if where in factors[part]}
        for part in components
        if part in factors
    }
    flat = {f"{part}.{where}": layer for part, inside in factors.items() for where, layer in inside.items()}
    receipt = _receipt(
        path, name, raw, updates, origin.family,
        components={part: {"tensors": applied[part], "modules": len(inside)} for part, inside in factors.items()},
        ignored=ignored,
        no_effect=tuple(where for where, layer in flat.items() if not layer.live),
        ranks=Counter(layer.rank for layer in flat.values() if layer.rank), alphas=alphas, sources=sources, sizes=sizes, kinds=kinds_of, stated=stated,
    )
    _covered(receipt, path.name, lora_family.base(components, family), allow_partial)
    return LoraFile(factors, receipt, "".join(repr(statement) for statement in stated if statement.order == scale.BESIDE))


def inspect(path: Path, raw: SafeFile | None = None) -> Receipt:
    """What a LoRA file is, without a base: nothing is applied, and every key is ignored because no base was given.

    Kinds, ranks, alphas and modules without effect (by their names in the file) are of its complete modules. raw: the file, where it was read
    already. Raises Refused for a file that is unsafe or broken.
    """
    path = Path(path)
    raw = raw or load_safely(path)
    updates, _ = modules(raw.tensors)
    stated = scale.statements(path, raw.metadata)
    whole = [module for module in updates if is_whole(module, raw.tensors)]
    sources = [_alphas(module, raw.tensors, stated, path.name) for module in whole]
    stating = [rows for rows in sources if rows]
    no_effect = [f"{module.component}.{module.module}" for module, rows in zip(whole, sources, strict=True) if _silent(module, raw, rows)]
    sizes = [_sizes(module, raw, rows[0].value if rows else None) for module, rows in zip(whole, sources, strict=True)]
    alphas = Counter(rows[0].value for rows in stating)
    return _alone(path, raw, updates, whole, no_effect=tuple(no_effect), alphas=alphas, sources=stating, sizes=sizes, stated=stated)


def unplaced(path: Path, raw: SafeFile) -> dict[str, Factors]:
    """The factors of a file without a base, by "component.module" with underscores for the dots of the module, the one spelling that layouts
    share. Of complete LoRA pairs alone that nothing blocks and whose ranks agree; alpha as `read` finds it. Raises Refused for one that cannot be read.
    """
    stated = scale.statements(path, raw.metadata)
    factors: dict[str, Factors] = {}
    for module in modules(raw.tensors)[0]:
        if module.blocked or not is_pair(module, raw.tensors) or kinds.word(_roles(module, raw.tensors)) != "LoRA":
            continue
        down, up = (raw.tensors[module.keys[role]] for role in ("down", "up"))
        if down.shape[0] == up.shape[1] and down.numel() and up.numel() == up.shape[0] * up.shape[1]:
            alpha = _alphas(module, raw.tensors, stated, path.name)[0].value
            factors[f"{module.component}.{layer_map.flat(module.module)}"] = Factors(down, up, alpha)
    return factors


def describe(path: Path) -> Receipt:
    """What the header of a LoRA file tells, for lists: as `inspect`, without alphas, hashes and what has no effect.

    Costs the header's bytes, whatever the size of the file. Raises Refused for a file that is no safetensors file; broken numbers
    are not seen.
    """
    path = Path(path)
    raw = load_header(path)
    updates, _ = modules(raw.tensors)
    return _alone(path, raw, updates, [module for module in updates if is_whole(module, raw.tensors)])


def stamp(path: Path) -> tuple[object, ...]:
    """What changes when a file, or what is read beside it, does. Raises OSError without the file."""
    read = (path, scale.beside(path))
    return tuple((str(part), part.stat().st_mtime_ns, part.stat().st_size) for part in read if part)


def shown(path: Path | str) -> str:
    """A path as text; bytes of it that are no text become question marks."""
    return str(path).encode("utf-8", "replace").decode()


def _alone(path: Path, raw: SafeFile, updates: Sequence[Module], whole: Sequence[Module], **more: Any) -> Receipt:
    """The receipt of a file for which no base was given."""
    return _receipt(
        path, "", raw, updates, lora_family.detect(updates, raw.tensors).family, components={}, ignored={NO_BASE: sorted(raw.tensors)},
        ranks=Counter(stated[0] for module in whole if (stated := ranked(module, raw.tensors))),
        kinds=Counter(kinds.word(_roles(module, raw.tensors)) for module in whole), **more)


def _roles(module: Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensors[key] for role, key in module.keys.items()}


def _alphas(module: Module, tensors: Mapping[str, Tensor], stated: Sequence[scale.Statement], file: str) -> tuple[scale.Alpha, ...]:
    """Every alpha stated for it, the one that counts first; none for a kind without alpha."""
    rank = ranked(module, tensors)
    return scale.alphas(module, tensors, stated, file, *rank) if rank else ()


def ranked(module: Module, tensors: Mapping[str, Tensor]) -> tuple[int, bool] | None:
    """The rank that its alpha is divided by, and whether it is of a convolution over more than one pixel; None for kinds without an alpha."""
    return kinds.ranked(_roles(module, tensors))


def _places(module: Module, names: Mapping[str, tuple[Part, ...]], norms: Mapping[str, str]) -> tuple[Part, ...]:
    """The layers that it is of; only differences can be of a norm."""
    name = layer_map.flat(module.module)
    if name in names or name not in norms or kinds.kind(module.keys) not in ("norm", "full"):
        return names.get(name, ())
    return (Part(norms[name]),)


def _settled(module: Module, components: Mapping[str, nn.Module]) -> Module:
    """With T5, which files call the third text encoder, where this base has it: FLUX's is its second."""
    third = module.component == "text_encoder_3" and "text_encoder_3" not in components and "transformer" in components
    return replace(module, component="text_encoder_2") if third else module


def _names(component: str, module: nn.Module, updates: Sequence[Module]) -> dict[str, tuple[Part, ...]]:
    count = sum(part.component == component and part.layout == "first-generation" for part in updates)
    numbered = layer_map.numbered(component, module, count) if count else {}
    return layer_map.parts(component, module) | {number: (Part(path),) for number, path in numbered.items()}


def _sizes(module: Module, raw: SafeFile, alpha: float | None) -> suspicious.Sizes:
    if {"down", "up"} <= set(module.keys) and alpha is not None:
        down, up = module.keys["down"], module.keys["up"]
        return suspicious.Sizes(module.module, raw.largest[down], raw.largest[up], alpha, raw.tensors[down].shape[0])
    peak = max((raw.largest[key] for role, key in module.keys.items() if role not in _NO_NUMBERS), default=0.0)
    return suspicious.Sizes(module.module, peak, 1.0, 1.0 if alpha is None else alpha, max((ranked(module, raw.tensors) or (1,))[0], 1))


def _silent(module: Module, raw: SafeFile, alphas: Sequence[scale.Alpha]) -> bool:
    """Whether it changes nothing, as far as its numbers tell without a base."""
    roles, zero = set(module.keys), {role for role, key in module.keys.items() if not raw.largest[key]}
    if roles & {"dora_scale", "magnitude", "rescale", "diff_b", "up_bias"}:
        return False
    product = bool(roles & {"down", "hada_w1_a", "lokr_w1", "lokr_w1_a"})  # of which one factor is enough
    none = bool(zero - _NO_NUMBERS) if product else roles - zero <= _NO_NUMBERS
    return none or bool(alphas) and not alphas[0].value


def is_whole(module: Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether all parts of an update of some kind are there, in floating point."""
    if not kinds.kind(module.keys) or module.blocked:
        return False
    return is_pair(module, tensors) if "down" in module.keys else _floating(module, tensors)


def _floating(module: Module, tensors: Mapping[str, Tensor]) -> bool:
    return all(tensors[key].dtype.is_floating_point for role, key in module.keys.items() if role not in _NO_NUMBERS)


def is_pair(module: Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it has a down and an up in floating point, with at least two dimensions."""
    if "down" not in module.keys or "up" not in module.keys:
        return False
    down, up = tensors[module.keys["down"]], tensors[module.keys["up"]]
    return down.dtype.is_floating_point and up.dtype.is_floating_point and down.ndim >= 2 and up.ndim >= 2


def _obstacle(
    module: Module, tensors: Mapping[str, Tensor], components: Mapping[str, nn.Module], where: Sequence[Part],
    known: Mapping[str, tuple[Collection[tuple[str, ...]], Collection[str]]],
) -> str:
    """Why a module cannot be applied at `where` (empty: the base has no layer of that name), or "".

    known: by component, the words that names of layers are made of, and the names of those that are there.
    """
    if module.blocked:
        return module.blocked
    if not kinds.kind(module.keys):
        return NO_PAIR if set(module.keys) <= {"down", "up", "alpha"} else NO_WHOLE
    if not _floating(module, tensors):
        return NO_FLOAT
    if module.component and module.component not in components:
        return f"this base has no {module.component}"
    if where:
        return ""
    return NO_LAYER if module.component and layer_map.spelled(module.module, *known[module.component]) else NO_NAME


def _receipt(
    path: Path, name: str, raw: SafeFile, updates: Sequence[Module], family: str, *,
    components: Mapping[str, Mapping[str, int]], ignored: Mapping[str, Sequence[str]],
    ranks: Mapping[int, int], no_effect: tuple[str, ...] = (), alphas: Mapping[float, int] | None = None,
    sources: Sequence[Sequence[scale.Alpha]] = (), sizes: Sequence[suspicious.Sizes] = (), kinds: Mapping[str, int] | None = None,
    stated: Sequence[scale.Statement] = (),
) -> Receipt:
    """The receipt, with the law checked: every tensor of the file is applied or ignored."""
    applied = sum(part["tensors"] for part in components.values())
    left_out = sum(len(keys) for keys in ignored.values())
    if applied + left_out != len(raw.tensors):
        raise AssertionError(f"{path.name}: {applied} applied + {left_out} ignored != {len(raw.tensors)} tensors")
    layouts = Counter(module.layout for module in updates).most_common()
    remarks = (*scale.remarks(sources), *scale.training(stated, raw.tensors), *suspicious.remarks(sizes))
    if any(rows[0].source == scale.NOBODY for rows in sources) and (passed := scale.passed_over(path)):
        remarks = (*remarks, passed)
    fast = speed.recognise(path, raw.metadata, {module.component for module in updates})
    remarks = (*remarks, fast.advice()) if fast else remarks
    return Receipt(
        name=name or shown(path.stem), path=shown(path), sha256=raw.sha256, tensor_sha256=raw.tensor_sha256, family=family,
        layout=" + ".join(layout for layout, _ in layouts) or "unknown",
        tensors=len(raw.tensors), applied=applied, components=components,
        ignored={reason: tuple(sorted(keys)) for reason, keys in ignored.items()},
        no_effect=no_effect, kinds=dict(kinds or {}), ranks=dict(ranks), alphas=dict(alphas or {}),
        alpha_from=dict(Counter(rows[0].source for rows in sources)), remarks=remarks,
        title=metadata.title(raw.metadata), category=metadata.category(raw.metadata) or (ALWAYS_ON if fast else ""),
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
