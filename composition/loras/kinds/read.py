"""The tensors of one module of a file, by role -> its update of each layer that it is of, of whatever kind it is.

Roles are those of `keys`. Nothing is truncated, and sizes that do not go together are refused: half of an update is another update.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from composition.loras.fused import Part
from composition.loras.kinds import lokr
from composition.loras.kinds.base import Several, Update
from composition.loras.kinds.dora import DoRA
from composition.loras.kinds.full import Full
from composition.loras.kinds.glora import GLoRA
from composition.loras.kinds.ia3 import IA3
from composition.loras.kinds.loha import LoHa
from composition.loras.kinds.lokr import LoKr, Side
from composition.loras.kinds.lora import Factors, cored, misfit, sized
from composition.loras.kinds.oft import OFT
from composition.loras.kinds.oftv2 import OFTv2, Rotation, side
from composition.loras.layers import Layer, Norm, shape

Tensors = Mapping[str, Tensor]  # by role

# Kind to the roles that it needs and those that it may have besides, without alpha.
_ROLES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    kind: (frozenset(needed.split()), frozenset(more.split())) for kind, (needed, more) in {
        "LoRA": ("down up", "mid up_bias dora_scale magnitude diff_b"),
        "LoHa": ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2 dora_scale magnitude diff_b"),
        "LoKr": ("", "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 dora_scale magnitude diff_b"),
        "OFT": ("oft_blocks", "rescale diff_b"),
        "OFTv2": ("oft_R", "scaled_oft diff_b"),
        "GLoRA": ("a1 a2 b1 b2", "bm diff_b"),
        "(IA)3": ("weight on_input", "diff_b"),
        "norm": ("", "w_norm b_norm"),
        "full": ("", "diff diff_b"),
    }.items()}
_LENGTHS = frozenset({"dora_scale", "magnitude"})
_NUMBERED = "oft_blocks."  # of a fused layer in kohya's files: a part's own, by number
_SHARED = frozenset({"diff_b", "alpha"}) | _LENGTHS


def kind(roles: Collection[str]) -> str:
    """What a module with these roles is: a key of the table above; "" where some of its parts are missing or of different kinds."""
    present = frozenset("oft_blocks" if role.startswith(_NUMBERED) else role for role in roles) - {"alpha"}
    for name, (needed, more) in _ROLES.items():
        fits = needed <= present <= needed | more and present - (_SHARED if name != "full" else frozenset())
        if not fits or len(present & _LENGTHS) > 1:
            continue
        if name == "LoKr" and not (_side(present, "lokr_w1") and _side(present, "lokr_w2") and ("lokr_t2" not in present or "lokr_w2_a" in present)):
            continue
        if name == "LoHa" and ("hada_t1" in present) != ("hada_t2" in present):
            continue
        return name
    return ""


def _side(present: Collection[str], name: str) -> bool:
    """Whether one side of a Kronecker product is there, whole or as both of its factors, and not both ways."""
    halves = {f"{name}_a", f"{name}_b"} & set(present)
    return len(halves) == 2 if name not in present else not halves


_WORDS = {"full": "full difference", "norm": "norm difference"}


def word(tensors: Tensors) -> str:
    """Its kind for people, "" where it is none."""
    name = kind(tensors)
    if name == "OFT" and "oft_blocks" in tensors and tensors["oft_blocks"].ndim == 4:
        return "BOFT"
    if name == "LoRA" and "mid" in tensors:
        name = "LoRA with a Tucker core"
    if name == "full" and "diff" not in tensors:
        return "bias difference"
    if _LENGTHS & set(tensors):
        return "DoRA" if name == "LoRA" else f"{name}, DoRA"
    return _WORDS.get(name, name)


def ranked(tensors: Tensors) -> tuple[int, bool] | None:
    """The rank that alpha is divided by, and whether it is of a convolution over more than one pixel; None for kinds without an alpha."""
    name, core = kind(tensors), None
    if name == "LoRA":
        low, core = tensors["down"], tensors.get("mid")
    elif name == "LoHa":
        low, core = tensors["hada_w1_b"], tensors.get("hada_t1")
    elif name == "GLoRA":
        a1, a2 = tensors["a1"], tensors["a2"]
        low, core = (tensors["b2"], tensors.get("bm")) if a1.shape[:1] >= a2.shape[:1] else (tensors["b1"], None)
    elif name == "LoKr" and ("lokr_w1" not in tensors or "lokr_w2" not in tensors):
        low, core = tensors.get("lokr_w2_b", tensors.get("lokr_w1_b")), tensors.get("lokr_t2")
        assert low is not None
    else:
        return None
    core = low if core is None else core
    return (low.shape[0] if low.ndim else 1), core.ndim == 4 and core.shape[2:] != (1, 1)


def inputs(tensors: Tensors) -> int:
    """How many inputs its layer has, 0 where its tensors alone do not tell."""
    name = kind(tensors)
    if name == "LoRA":
        return _side_of(tensors["down"], 1)
    if name == "LoHa":
        return _side_of(tensors["hada_w1_b"], 1)
    if name == "LoKr":
        small, large = (tensors.get(f"lokr_{side}", tensors.get(f"lokr_{side}_b")) for side in ("w1", "w2"))
        return _side_of(small, 1) * _side_of(large, 1)
    if name == "GLoRA":
        return max(_side_of(tensors["a1"], 0), _side_of(tensors["a1"], 1))
    return _side_of(tensors["diff"], 1) if "diff" in tensors else 0


def _side_of(tensor: Tensor | None, axis: int) -> int:
    return tensor.shape[axis] if tensor is not None and tensor.ndim >= 2 else 0


def fitted(
    tensors: Tensors, alpha: float | None, layers: Mapping[str, Layer | Norm], parts: Sequence[Part], settings: Mapping[str, Any] | None = None,
) -> dict[str, Update]:
    """By path, the update of each layer. alpha: for kinds that have one. settings: PEFT's of the file, for kinds that are read by them.

    Raises ValueError, in plain words, when they do not fit.
    """
    first = shape(layers[parts[0].path])
    whole = (sum(shape(layers[part.path])[0] for part in parts), *first[1:])
    if any(not tensor.numel() for tensor in tensors.values()):
        raise ValueError("a part of it is empty")
    if any(role.startswith(_NUMBERED) for role in tensors):
        return _by_part(tensors, whole, parts)
    update = _update(tensors, alpha, whole, isinstance(layers[parts[0].path], nn.LayerNorm | nn.GroupNorm), settings or {})
    if not math.isfinite(getattr(update, "scale", 1.0)) or isinstance(update, Factors) and not math.isfinite(update.peak):
        raise ValueError(f"alpha {alpha:g} makes its numbers infinite")
    every = [part._replace(stop=None) if part.start == 0 and part.stop == whole[0] else part for part in parts]
    return {part.path: update if part == Part(part.path) else update.part(part) for part in every}


def _update(tensors: Tensors, alpha: float | None, size: tuple[int, ...], norm: bool, settings: Mapping[str, Any]) -> Update:
    name, beside = kind(tensors), list[Update]()
    if norm and name not in ("norm", "full"):
        raise ValueError(f"it is a norm, which a {word(tensors)} cannot be of")
    if name == "norm" or name == "full":
        if name == "norm" and not norm:
            raise ValueError("it is no norm")
        return _full(tensors, size)
    update = _oftv2(tensors, size, settings) if name == "OFTv2" else _BUILD[name](tensors, alpha, size)
    for role in _LENGTHS & set(tensors):
        update = _lengths(update, tensors[role], role, size)
    if "up_bias" in tensors:
        beside.append(Full(None, _vector(tensors["up_bias"], size[0], "bias"), (alpha or 0.0) / tensors["down"].shape[0]))
    if "diff_b" in tensors:
        beside.append(Full(None, _vector(tensors["diff_b"], size[0], "bias")))
    return Several((update, *beside)) if beside else update


def _lora(tensors: Tensors, alpha: float | None, size: tuple[int, ...]) -> Factors:
    down, up = tensors["down"], tensors["up"]
    if "mid" in tensors:
        down = _core(tensors["mid"], down)
    return sized(down, up, alpha, size)


def _matrix(factor: Tensor) -> Tensor:
    if factor.ndim != 2:
        raise ValueError(f"its factor of shape {tuple(factor.shape)} is no matrix")
    return factor


def _loha(tensors: Tensors, alpha: float | None, size: tuple[int, ...]) -> LoHa:
    pairs: list[Factors] = []
    for number in "12":
        up, down = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
        if f"hada_t{number}" in tensors:
            up, down = _matrix(up).mT, _core(tensors[f"hada_t{number}"], down)
        pairs.append(sized(down, up, None, size))
    ranks = [pair.rank for pair in pairs]
    if ranks[0] != ranks[1]:
        raise ValueError(f"its two products have ranks {ranks[0]} and {ranks[1]}, which must be the same")
    return LoHa(pairs[0], pairs[1], _scale(alpha, ranks[0]))


def _lokr(tensors: Tensors, alpha: float | None, size: tuple[int, ...]) -> LoKr:
    small: Side
    if "lokr_w1" in tensors:
        small = tensors["lokr_w1"]
    else:
        small = _pair(tensors["lokr_w1_b"], tensors["lokr_w1_a"])
    (a, b), kernel = _two(lokr.size(small), "small"), size[2:]
    if len(lokr.size(small)) != 2 or size[0] % a or size[1] % b:
        raise ValueError(f"its small factor {lokr.size(small)} does not divide a layer of shape {size} (out, in)")
    c, d = size[0] // a, size[1] // b
    large: Side
    if "lokr_w2" in tensors:
        large = tensors["lokr_w2"]
        if _bare(tuple(large.shape)) != _bare((c, d, *kernel)):
            raise misfit(f"its factors {lokr.size(small)} and {tuple(large.shape)}", size)
        large = large.reshape(c, d, *kernel)
    else:
        up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        if "lokr_t2" in tensors:
            up, down = _matrix(up).mT, _core(tensors["lokr_t2"], down)
        if up.ndim < 2 or down.ndim < 2 or up.shape[0] * up.shape[1] != up.numel() or (up.shape[0], down.shape[0]) != (c, up.shape[1]) \
                or down.numel() != down.shape[0] * math.prod((d, *kernel)):
            raise misfit(f"its factors {lokr.size(small)}, {tuple(up.shape)} and {tuple(down.shape)}", size)
        large = Factors(down.reshape(-1, d, *kernel), up.reshape(c, -1))
    ranks = {side.rank for side in (small, large) if isinstance(side, Factors)}
    if len(ranks) > 1:
        raise ValueError(f"its factors have ranks {' and '.join(map(str, sorted(ranks)))}, which must be the same")
    return LoKr(small, large, _scale(alpha, ranks.pop()) if ranks else 1.0)


def _oft(tensors: Tensors, alpha: float | None, size: tuple[int, ...]) -> OFT:
    blocks, out = tensors["oft_blocks"], size[0]
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or blocks.shape[-3] * blocks.shape[-1] != out:
        raise ValueError(f"its blocks {tuple(blocks.shape)} do not make up the {out} outputs of the layer")
    if blocks.ndim == 4 and (blocks.shape[-1] % 2 or out % (blocks.shape[-1] * 2 ** (blocks.shape[0] - 1))):
        raise ValueError(f"its {blocks.shape[0]} butterflies of blocks of {blocks.shape[-1]} do not divide the {out} outputs of the layer")
    rescale = _vector(tensors["rescale"], out, "rescale") if "rescale" in tensors else None
    bound = float(_vector(tensors["alpha"], 1, "alpha")) if "alpha" in tensors else 0.0
    return OFT(blocks, rescale, max(bound, 0.0) * out)


def _oftv2(tensors: Tensors, size: tuple[int, ...], settings: Mapping[str, Any]) -> OFTv2:
    above, inputs = tensors["oft_R"], size[1]
    if any(length > 1 for length in size[2:]):
        raise ValueError("an OFT of the inputs of a convolution over more than one pixel is not supported: merged it is another update than live")
    n = side(above.shape[1]) if above.ndim == 2 else 0
    if not n or len(above) not in (1, inputs // n) or inputs % n:
        raise ValueError(f"its numbers {tuple(above.shape)} are not those above the diagonals of blocks that make up the {inputs} inputs of the layer")
    update = OFTv2(above, inputs, Rotation.of(settings, scaled="scaled_oft" in tensors))
    if not update.changes(above.device, update.dtype).isfinite().all():
        raise ValueError("its rotations are infinite")
    return update


def _by_part(tensors: Tensors, whole: tuple[int, ...], parts: Sequence[Part]) -> dict[str, Update]:
    """OFT of a fused layer in kohya's files: each of the layers that it is of has blocks of its own, and the bound is of each."""
    ordered = sorted(parts, key=lambda part: part.start)
    names = [f"{_NUMBERED}{number}" for number in range(len(parts))]
    if {role for role in tensors if role != "alpha"} != set(names):
        raise ValueError(f"it has blocks for {len(set(tensors) - {'alpha'})} layers where the base has {len(parts)}")
    if any(part.turned for part in parts):
        raise ValueError("its kind cannot be parted among the layers that it is of")
    alpha = {"alpha": tensors["alpha"]} if "alpha" in tensors else {}
    return {part.path: _oft({"oft_blocks": tensors[name], **alpha}, None, ((part.stop or whole[0]) - part.start, *whole[1:]))
            for part, name in zip(ordered, names, strict=True)}  # fmt: skip


def _glora(tensors: Tensors, alpha: float | None, size: tuple[int, ...]) -> GLoRA:
    a1, a2, b1, b2 = (tensors[role] for role in ("a1", "a2", "b1", "b2"))
    if min(tensor.ndim for tensor in (a1, a2, b1, b2)) < 2:
        raise ValueError("its factors are no matrices")
    if (a1.shape[0], a2.shape[1], b1.shape[0]) != (size[1], size[1], size[0]) and (a2.shape[0], a1.shape[1], b2.shape[0]) == (size[1], size[1], size[0]):
        a1, a2, b1, b2 = a2, a1, b2, b1  # its first files
    if "bm" in tensors:
        b2 = _core(tensors["bm"], b2)
    before = sized(a2, a1, None, (size[1], size[1]))
    if before.rank != b2.shape[0]:
        raise ValueError(f"its two pairs have ranks {before.rank} and {b2.shape[0]}, which must be the same")
    return GLoRA(before, sized(b2, b1, alpha, size), _scale(alpha, before.rank))


def _ia3(tensors: Tensors, alpha: float | None, size: tuple[int, ...]) -> IA3:
    if tensors["on_input"].numel() != 1:
        raise ValueError("its on_input is not one number")
    on_input = bool(tensors["on_input"].item())
    return IA3(_vector(tensors["weight"], size[1 if on_input else 0], "vector"), on_input)


def _full(tensors: Tensors, size: tuple[int, ...]) -> Full:
    weight = tensors.get("diff", tensors.get("w_norm"))
    bias = tensors.get("diff_b", tensors.get("b_norm"))
    if weight is not None:
        if _bare(tuple(weight.shape)) != _bare(size):
            raise misfit(f"its difference {tuple(weight.shape)}", size)
        weight = weight.reshape(size)
    return Full(weight, None if bias is None else _vector(bias, size[0], "bias"))


_BUILD = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, "OFT": _oft, "GLoRA": _glora, "(IA)3": _ia3}


def _lengths(update: Update, lengths: Tensor, role: str, size: tuple[int, ...]) -> DoRA:
    """PEFT's are of outputs always; LyCORIS' shape says of which."""
    by_output = role == "magnitude" or lengths.ndim > 0 and lengths.shape[0] == size[0]
    if not by_output and not (lengths.ndim > 1 and lengths.shape[0] == 1):
        raise misfit(f"its DoRA lengths {tuple(lengths.shape)}", size)
    return DoRA(update, _vector(lengths, size[0 if by_output else 1], "DoRA lengths"), by_output)


def _vector(tensor: Tensor, count: int, what: str) -> Tensor:
    if tensor.numel() != count:
        raise ValueError(f"its {what} has {tensor.numel()} numbers in place of {count}")
    return tensor.reshape(count)


def _core(core: Tensor, down: Tensor) -> Tensor:
    if core.ndim != 4 or down.ndim < 2 or down.shape[0] * down.shape[1] != down.numel() or core.shape[1] != down.shape[0]:
        raise ValueError(f"its core {tuple(core.shape)} and its factor {tuple(down.shape)} do not go together")
    whole = cored(core, down.flatten(1))
    if not whole.isfinite().all():
        raise ValueError("its core and factors make numbers that are infinite")
    return whole


def _pair(down: Tensor, up: Tensor) -> Factors:
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise ValueError(f"its factors {tuple(up.shape)} and {tuple(down.shape)} do not go together")
    return Factors(down, up)


def _two(sides: tuple[int, ...], what: str) -> tuple[int, int]:
    if len(sides) != 2:
        raise ValueError(f"its {what} factor {sides} is no matrix")
    return sides[0], sides[1]


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _bare(size: tuple[int, ...]) -> tuple[int, ...]:
    return size[:2] if size[2:] == (1, 1) else size
