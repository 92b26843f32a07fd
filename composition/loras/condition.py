"""Condition LoRAs as files: EasyControl's layout (arXiv 2503.07027), with what a condition is told in the header.

Released files have tensors alone, `{block}.attn.processor.{q,k,v,proj}_loras.{n}.{down,up}.weight`, 380 for FLUX.1: alpha is the rank, kind
and size are known from elsewhere. Ours state them. "proj" acts on the output of `to_out.0`: it is no ordinary LoRA of that layer.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from PIL import ImageColor
from safetensors.torch import save
from torch import Tensor, nn

from composition import atomic
from composition.loras import layers as layer_map
from composition.loras import metadata, reader, writer
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import SafeFile, load_header, load_safely
from composition.loras.scale import NOBODY
from composition.refusal import Refused
from composition.request import Receipt

Kind = Literal["spatial", "subject"]
PREFIX = "condition."  # of our keys in a header
VERSION = 1
SIZE = 512  # pixels: what released files were trained at
OFFSET = 64  # rows that a subject stands below the picture's first
MAX_SIZE, MAX_RANK, MAX_ADAPTERS, MAX_BIAS = 4096, 4096, 16, 20
LAYOUT, HEADER = "easycontrol", "the file's header"
NO_PROJECTION = "its header says that proj is not applied"
_KEY = re.compile(r"(?:transformer\.)?((?:single_)?transformer_blocks\.\d{1,4}\.attn)\.processor\.(q|k|v|proj)_loras\.(\d{1,4})\.(down|up)\.weight")
_LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}
_ROLES = {layer: role for role, layer in _LAYERS.items()}


@dataclass(frozen=True)
class Settings:
    """How a condition LoRA wants its picture.

    kind: "spatial" (edges, depth: stretched over the picture) or "subject" (a thing by itself, beside the picture). size: pixels of the side of
    what is encoded. alpha: None is the rank. base: the model that it was trained on. pad: colour around a subject and behind what is
    transparent. annotator: what makes its pictures, by name. offset: rows between a subject and the picture's first; clear: more where the picture
    has more rows of tokens, so that they do not meet (the published code lets them). rounded: position ids rounded to bfloat16, as the
    published code does. projection: False where proj is not applied (OmniConsistency). bias: added to the logits of its tokens wherever they are
    read, as it was trained: a condition that is hardly seen at first does not have to be unlearned before it is learned.
    """

    kind: Kind = "spatial"
    size: int = SIZE
    alpha: float | None = None
    base: str = ""
    pad: str = "black"
    annotator: str = ""
    offset: int = OFFSET
    clear: bool = True
    rounded: bool = False
    projection: bool = True
    bias: float = 0.0

    def words(self) -> dict[str, str]:
        """As a header states them; what is as usual in released files is stated too."""
        values: dict[str, Any] = {"version": VERSION, **vars(self), "alpha": "" if self.alpha is None else f"{self.alpha:g}", "bias": f"{self.bias:g}"}
        return {f"{PREFIX}{name}": str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}

    @property
    def factor(self) -> float:
        """What a strength of 1 amounts to: the bias as a number of times that each token counts."""
        return math.exp(self.bias)

    @property
    def colour(self) -> tuple[int, int, int]:
        return ImageColor.getrgb(self.pad)[:3]


@dataclass(frozen=True, eq=False)
class ConditionLora:
    """adapters: each by path of the transformer's layer; a file trained on several conditions at once has several."""

    adapters: tuple[Mapping[str, Factors], ...]
    settings: Settings
    receipt: Receipt


class _Place(NamedTuple):
    """Where a tensor belongs: adapter, layer, and which factor of it."""

    adapter: int
    path: str
    role: str


def of_output(path: str) -> bool:
    """Whether the LoRA of this layer acts on the layer's output, not on its input."""
    return path.endswith(_LAYERS["proj"])


def is_one(keys: Sequence[str]) -> bool:
    """Whether a file of these tensors is a condition LoRA."""
    return any(_KEY.fullmatch(key) for key in keys)


def read(path: Path, transformer: nn.Module, *, name: str = "") -> ConditionLora:
    """Read a condition LoRA for this transformer (on any device, "meta" too). name: what the receipt calls it (the file's stem).

    Raises Refused for a file that is unsafe, broken, no condition LoRA, made for another model, or not wholly understood.
    """
    raw, settings, places = _opened(path, load_safely(path))
    layers, pairs = layer_map.layers(transformer), _pairs(path, places)
    adapters = tuple({} for _ in range(1 + max(adapter for adapter, _ in pairs)))
    unused: list[str] = []
    for (adapter, where), keys in sorted(pairs.items(), key=lambda pair: pair[0]):
        if of_output(where) and not settings.projection:
            unused += keys.values()
            continue
        down, up = raw.tensors[keys["down"]], raw.tensors[keys["up"]]
        if where not in layers:
            raise Refused(f"{path.name}: this model has no layer {where}: the condition LoRA was made for a larger one")
        adapters[adapter][where] = _fitted(path, where, down, up, settings, layer_map.shape(layers[where]))
    attention = {layer for layer in layers if layer.endswith((".attn.to_q", ".attn.to_k", ".attn.to_v", ".attn.to_out.0"))}
    return ConditionLora(adapters, settings, _receipt(path, name, raw, settings, adapters, unused, attention))


def describe(path: Path) -> tuple[Settings, Receipt]:
    """What a file's header tells, for lists and for preparing a picture: nothing is applied, no number is read. Raises Refused as `read`."""
    raw, settings, places = _opened(path, load_header(path))
    _pairs(path, places)
    return settings, _receipt(path, "", raw, settings, (), sorted(raw.tensors), set(), reader.NO_BASE)


def write(
    path: Path, factors: Mapping[str, Factors], settings: Settings, words: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write one adapter by path of layer. words: further ones of the header (title, trigger_words). The file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for where, layer in factors.items():
        block, _, inner = where.partition(".attn.")
        for role, factor in (("down", layer.stored_down), ("up", layer.stored_up)):
            tensors[f"{block}.attn.processor.{_ROLES[inner]}_loras.0.{role}.weight"] = factor.detach().to("cpu", dtype, copy=True).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, writer.ordered(save(tensors, metadata={"format": "pt", **(words or {}), **settings.words()})))


def _opened(path: Path, raw: SafeFile) -> tuple[SafeFile, Settings, dict[str, _Place]]:
    """The file, its settings, and where each of its tensors belongs."""
    places = {key: _Place(int(match[3]), f"{match[1]}.{_LAYERS[match[2]]}", match[4])
              for key in raw.tensors if (match := _KEY.fullmatch(key))}
    strange = [key for key in raw.tensors if key not in places]
    if not places:
        raise Refused(f"{path.name} is no condition LoRA: none of its {len(raw.tensors)} tensors is named like one (as {strange[0]!r:.120}); "
                      "an ordinary LoRA is used as a LoRA, not as a condition")
    if strange:
        raise Refused(f"{path.name}: {len(strange)} of its {len(raw.tensors)} tensors are no part of a condition LoRA (as {strange[0]!r:.120})")
    return raw, _settings(path, raw.metadata), places


def _pairs(path: Path, places: Mapping[str, _Place]) -> dict[tuple[int, str], dict[str, str]]:
    """(adapter, layer) to the keys of its down and up. Adapters are numbered from 0 without a gap."""
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for key, place in sorted(places.items()):
        pair = pairs.setdefault((place.adapter, place.path), {})
        if place.role in pair:
            raise Refused(f"{path.name}: {place.path} has two of {place.role} (as {key!r:.120}): nothing says which is meant")
        pair[place.role] = key
    for (_, where), pair in pairs.items():
        if len(pair) < 2:
            raise Refused(f"{path.name}: {where} has {next(iter(pair))} alone: the file is incomplete, download it again")
    numbers = sorted({adapter for adapter, _ in pairs})
    if numbers != list(range(len(numbers))) or len(numbers) > MAX_ADAPTERS:
        raise Refused(f"{path.name}: its adapters are numbered {numbers[:8]}; they must be 0, 1, ... up to {MAX_ADAPTERS - 1}")
    return pairs


def _fitted(path: Path, where: str, down: Tensor, up: Tensor, settings: Settings, shape: tuple[int, ...]) -> Factors:
    """A layer's factors in the shape that it has."""
    outputs, inputs = shape[0], shape[0] if of_output(where) else shape[1]
    if not (down.dtype.is_floating_point and up.dtype.is_floating_point):
        raise Refused(f"{path.name}: the factors of {where} are not floating-point numbers")
    rank = down.shape[0] if down.ndim == 2 else 0
    if not 0 < rank <= MAX_RANK or down.shape != (rank, inputs) or up.shape != (outputs, rank):
        raise Refused(f"{path.name}: the factors {tuple(up.shape)} x {tuple(down.shape)} of {where} do not fit a layer of {inputs} inputs and "
                      f"{outputs} outputs: it was made for a model of another width")
    factors = Factors(down, up, settings.alpha)
    if not math.isfinite(factors.scale) or not math.isfinite(factors.peak):
        raise Refused(f"{path.name}: alpha {settings.alpha:g} makes the numbers of {where} infinite")
    return factors


def _receipt(
    path: Path, name: str, raw: SafeFile, settings: Settings, adapters: Sequence[Mapping[str, Factors]], unused: Sequence[str],
    attention: set[str], reason: str = NO_PROJECTION,
) -> Receipt:
    """The receipt, with the law checked: every tensor of the file is applied or ignored."""
    flat = [(f"{index}.{where}" if len(adapters) > 1 else where, layer) for index, adapter in enumerate(adapters)
            for where, layer in adapter.items()]  # fmt: skip
    applied = 2 * len(flat)
    if applied + len(unused) != len(raw.tensors):
        raise AssertionError(f"{path.name}: {applied} applied + {len(unused)} ignored != {len(raw.tensors)} tensors")
    remarks = () if f"{PREFIX}kind" in raw.metadata else (
        f"its header does not say what it is: taken for {settings.kind}, pictures of {settings.size} pixels, by its name",)
    if adapters and (bare := len(attention) - max(len(adapter) for adapter in adapters)) > 0:
        remarks = (*remarks, f"{bare} of this model's attention projections are as in the base")
    return Receipt(
        name=name or reader.shown(path.stem), path=reader.shown(path), sha256=raw.sha256, tensor_sha256=raw.tensor_sha256, family="flux",
        layout=LAYOUT, tensors=len(raw.tensors), applied=applied,
        components={"transformer": {"tensors": applied, "modules": len(dict(flat))}} if flat else {},
        ignored={reason: tuple(sorted(unused))} if unused else {}, no_effect=tuple(where for where, layer in flat if not layer.live),
        ranks=dict(Counter(layer.rank for _, layer in flat)),
        alphas=dict(Counter(float(layer.rank) if layer.alpha is None else layer.alpha for _, layer in flat)),
        alpha_from={NOBODY if settings.alpha is None else HEADER: len(flat)} if flat else {}, remarks=remarks,
        title=metadata.title(raw.metadata), category=metadata.category(raw.metadata), triggers=metadata.triggers(raw.metadata),
        metadata=dict(raw.metadata), data_sha256=raw.data_sha256)


def _settings(path: Path, header: Mapping[str, str]) -> Settings:
    """What a header states; of a released file, which states nothing, by its name. Raises Refused for what makes no sense."""
    usual = Settings(kind="subject" if "subject" in path.stem.lower() else "spatial")
    text = {name: header[f"{PREFIX}{name}"].strip() for name in ("version", *vars(usual)) if header.get(f"{PREFIX}{name}", "").strip()}

    def wrong(name: str, expected: str) -> Refused:
        return Refused(f"{path.name}: its header says {PREFIX}{name} = {text[name]!r:.80}; expected {expected}")

    def whole(name: str, low: int, high: int, default: int) -> int:
        value = text.get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,6}", value) or not low <= int(value) <= high:
            raise wrong(name, f"a whole number from {low} to {high}")
        return int(value)

    def flag(name: str, default: bool) -> bool:
        value = text.get(name, str(default)).lower()
        if value not in ("true", "false"):
            raise wrong(name, "true or false")
        return value == "true"

    if whole("version", 1, 999_999, VERSION) > VERSION:
        raise Refused(f"{path.name} was written by a newer Medley (condition version {text['version']}; this one reads {VERSION}): update Medley")
    kind = text.get("kind", usual.kind)
    if kind not in get_args(Kind):
        raise wrong("kind", " or ".join(get_args(Kind)))
    try:
        alpha = float(text["alpha"]) if "alpha" in text else None
    except ValueError:
        raise wrong("alpha", "a number") from None
    if alpha is not None and not (math.isfinite(alpha) and abs(alpha) <= 1e6):
        raise wrong("alpha", "a number of at most a million")
    try:
        bias = float(text.get("bias", "0"))
    except ValueError:
        raise wrong("bias", "a number") from None
    if not abs(bias) <= MAX_BIAS:
        raise wrong("bias", f"a number from -{MAX_BIAS} to {MAX_BIAS}")
    pad = text.get("pad", usual.pad)
    try:
        ImageColor.getrgb(pad[:40])
    except ValueError:
        raise wrong("pad", "a colour, as black or #808080") from None
    return Settings(
        kind=cast(Kind, kind), size=whole("size", 8, MAX_SIZE, SIZE), alpha=alpha, base=text.get("base", "")[: metadata.MAX_LETTERS], pad=pad[:40],
        annotator=text.get("annotator", "")[: metadata.MAX_LETTERS], offset=whole("offset", 0, 100_000, OFFSET),
        clear=flag("clear", True), rounded=flag("rounded", False), projection=flag("projection", True), bias=bias)
