"""What a LoRA's updates are multiplied by: the alpha of each module, and who states it.

A module's factor is alpha / rank, with rank-stabilised scaling (arXiv 2312.03732) alpha / sqrt(rank). Where several state an alpha,
the first of these is used, and the receipt says which and why:

    1. the alpha tensor of the module                        stored with the layer it is of
    2. JSON settings in the file's header                    by layer, and travelling with the file
    3. adapter_config.json beside the file                   by layer, as PEFT writes it
    4. numbers in the file's header                          one for all layers: unet.lora_alpha, lora_alpha, network_alpha,
                                                             ss_network_alpha, alpha

Where nobody does, alpha is the rank. Where the one that counts cannot be read, or is of another rank than the factors have, the
file is refused: its strength would be a guess.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from composition import untrusted
from composition.loras.keys import Module
from composition.loras.patterns import Patterns
from composition.loras.safetensors import ENDING
from composition.refusal import Refused

TENSORS = "alpha tensors"
NOBODY = "nobody: alpha is the rank"
CONFIG = "adapter_config.json"  # beside the file
BESIDE = 2  # the order of what it states
ADAPTER = "lora_adapter_metadata"  # in the header, as diffusers writes it
MAX_CONFIG_BYTES = 4 * 2**20
MAX_NUMBER_LETTERS = 400  # of a number in a header

_JSON = (ADAPTER, "adapter_config", "peft_config", "lora_config")  # header keys that hold JSON settings
_NUMBERS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
_DENOISERS = ("unet", "transformer", "diffusion_model", "model", "dit", "denoiser")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # ways of starting that change the base's weights, in PEFT's words
OFT = "OFT"  # PEFT's word for settings of rotations
_ABSENT = ("", "none", "null")


class Alpha(NamedTuple):
    """alpha such that alpha / rank is the module's factor. source: who states it. order: of the list above, from 0."""

    value: float
    source: str
    order: int


class _Unreadable(Exception):
    """Why a statement cannot be used, as the end of a sentence that begins with the file's name."""


@dataclass(frozen=True)
class Statement:
    """A source that states alphas: settings in PEFT's terms, by component ("" for all).

    trouble: why it cannot be read. plain: its values are numbers as text, of a header. conv: alpha of convolutions over more than
    one pixel, where it differs (LyCORIS).
    """

    source: str
    order: int
    settings: Mapping[str, Mapping[str, Any]]
    trouble: str = ""
    plain: bool = False
    conv: str | None = None

    def alpha(self, component: str, module: str, rank: int, wide: bool) -> float | None:
        """The alpha it states for a module of that rank; None when it states none. Raises _Unreadable."""
        if self.trouble:
            raise _Unreadable(self.trouble)
        alike = _DENOISERS if component in _DENOISERS or not component else (component,)
        prefix = next((name for name in (component, *alike, "") if name in self.settings), None)
        if prefix is None:
            return None
        settings = self.settings[prefix]
        value = self._number(self.conv if wide and self.conv is not None else settings.get("lora_alpha"), "alpha")
        value = self._number(self._pattern(prefix, "alpha_pattern", module), "alpha", value)
        if value is None:
            return None
        stated = self._number(self._pattern(prefix, "rank_pattern", module), "rank", self._number(settings.get("r"), "rank"))
        if stated is not None and stated != rank:
            raise _Unreadable(f"its {self.source} says rank {stated:g} for {module[:100]!r}, whose factors have rank {rank}: it was written "
                              "for another file, so the strength is unknown; put the right file there or remove it")
        return value * (math.sqrt(rank) if _shown(settings.get("use_rslora")).lower() == "true" else 1.0)

    def _number(self, value: Any, what: str, otherwise: float | None = None) -> float | None:
        if value is None or self.plain and value.strip().lower() in _ABSENT:
            return otherwise
        number = value
        if self.plain:
            number = float(value) if _is_number(value) else None
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):  # none of JSON is over 300 digits
            raise _Unreadable(f"{what} {_shown(value)!r} in its {self.source} is not a number, so its strength is unknown")
        return float(number)

    def _pattern(self, prefix: str, name: str, module: str) -> Any:
        """What the first fitting pattern says, None where there is none."""
        try:
            patterns = self._patterns.get((prefix, name))
            if isinstance(patterns, ValueError):
                raise patterns
            return patterns.find(module) if patterns else None
        except ValueError as error:
            raise _Unreadable(f"{name} in its {self.source} cannot be read: {error}") from None

    @cached_property
    def _patterns(self) -> dict[tuple[str, str], Patterns | ValueError]:
        """(component, kind of pattern) to the patterns, or why they cannot be read."""
        tables: dict[tuple[str, str], Patterns | ValueError] = {}
        for prefix, settings in self.settings.items():
            for name in ("alpha_pattern", "rank_pattern"):
                if settings.get(name):
                    try:
                        tables[prefix, name] = Patterns(settings[name])
                    except ValueError as error:
                        tables[prefix, name] = error
        return tables


def statements(path: Path, metadata: Mapping[str, str]) -> tuple[Statement, ...]:
    """All that state alphas of a file outside its tensors, the one that counts first."""
    stated = [_json(f"{key} in the header", 1, metadata[key]) for key in _JSON
            if key in metadata and (key == ADAPTER or metadata[key].lstrip().startswith("{"))]
    if config := beside(path):
        stated.append(_config(config))
    return (*stated, *_numbers(metadata))


def beside(path: Path) -> Path | None:
    """The adapter_config.json that belongs to this file: of adapter_model.safetensors, or of a file that is alone in its folder.

    Of a link the folder of the link is searched, then that of the file.
    """
    return next((config for config, belongs in _configs(path) if belongs), None)


def passed_over(path: Path) -> str:
    """A remark on an adapter_config.json beside several files, when it is not certain which one it belongs to; "" without."""
    configs = list(_configs(path))
    if not configs or any(belongs or _model(config.parent) for config, belongs in configs):
        return ""
    return f"{CONFIG} lies beside it and beside other LoRA files: which it belongs to is unknown, so it was not read"


def training(stated: Sequence[Statement], names: Iterable[str]) -> tuple[str, ...]:
    """Remarks on what PEFT's settings say of how a file was trained, where its numbers alone are something else. names: of its tensors."""
    sentences: list[str] = []
    settings = [(statement.source, values) for statement in stated if not statement.plain for values in statement.settings.values()]
    if not any("magnitude" in name or name.endswith("dora_scale") for name in names):
        sentences += [f"{source} says use_dora, but the file has no magnitudes: it is applied as a plain LoRA"
                      for source, values in settings if values.get("use_dora") is True]
    sentences += [f"{source} says init_lora_weights {_shown(start)}: unless it was converted afterwards, it goes with a base that training "
                  "changed, and looks wrong on the original" for source, values in settings
                  if isinstance(start := values.get("init_lora_weights"), str) and start.lower().startswith(_CHANGES_BASE)]
    return tuple(dict.fromkeys(sentences))


def rotation(stated: Sequence[Statement], component: str) -> Mapping[str, Any] | None:
    """PEFT's settings of the rotations (OFT) of a component, of the statement that counts; None where nobody states any.

    Raises Refused where the one that counts cannot be read.
    """
    for statement in stated:
        if statement.trouble:
            raise Refused(statement.trouble)
        for prefix in (component, *(_DENOISERS if component in _DENOISERS else ()), ""):
            settings = statement.settings.get(prefix, {})
            if _shown(settings.get("peft_type")).upper().rpartition(".")[2] == OFT:
                return settings
    return None


def alphas(module: Module, tensors: Mapping[str, Tensor], stated: Sequence[Statement], file: str, rank: int, wide: bool) -> tuple[Alpha, ...]:
    """Every alpha stated for a module of this rank, the one that counts first; the rank where there is none. wide: of a convolution over more
    than one pixel.

    Raises Refused when the one that counts cannot be read.
    """
    candidates: list[Alpha] = []
    if "alpha" in module.keys:
        value = tensors[module.keys["alpha"]]
        if value.numel() != 1 or value.is_complex():
            raise Refused(f"{file}: {module.keys['alpha']!r} is not one number but of shape {tuple(value.shape)}")
        candidates.append(Alpha(float(value.item()), TENSORS, 0))
    for statement in stated:
        try:
            value = statement.alpha(module.component, module.module, rank, wide)
        except _Unreadable as error:
            if not candidates:
                raise Refused(f"{file}: {error}") from None
            continue
        if value is not None:
            candidates.append(Alpha(value, statement.source, statement.order))
    return tuple(candidates) or (Alpha(float(rank), NOBODY, 4),)


def remarks(by_module: Sequence[Sequence[Alpha]]) -> tuple[str, ...]:
    """What a user should know of where the alphas of a file's modules came from: sources outside the tensors, and disagreement."""
    sentences: list[str] = []
    counting = Counter((rows[0].source, rows[0].value) for rows in by_module if rows[0].order in (2, 3))
    sentences += [f"alpha {value:g} from {source} ({_modules(count)})" for (source, value), count in counting.most_common(3)]
    lone = sum(rows[0].source == NOBODY for rows in by_module)
    if 0 < lone < len(by_module):
        sentences.append(f"alpha of {_modules(lone)} is stated nowhere and taken as the rank")
    differing = Counter((rows[0], other) for rows in by_module for other in rows[1:] if not _alike(rows[0].value, other.value))
    for (first, other), count in differing.most_common(3):
        sentences.append(f"alpha {first.value:g} from {first.source}, not {other.value:g} from {other.source} ({_modules(count)}): "
                    + _law(first.order, other.order))
    return tuple(sentences)


def _law(first: int, other: int) -> str:
    """Why an alpha of the first order counts, and not one of the other."""
    if first == 0:
        return "what is stored with a layer comes first"
    if first == other:
        return f"the first of {', '.join(_JSON if first == 1 else _NUMBERS)} counts"
    return "settings by layer come before one number for all" if other == 3 else "what a file carries comes before what lies beside it"


def _alike(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=4e-3)  # a bfloat16 has 8 bits


def _modules(count: int) -> str:
    return f"{count} module{'s' * (count > 1)}"


def _json(source: str, order: int, text: str | bytes) -> Statement:
    try:
        document = untrusted.parse(text, odd_letters=True)
    except untrusted.Unreadable as error:
        return Statement(source, order, {}, trouble=f"its {source} {error}, so its alphas are unknown")
    if not isinstance(document, dict):
        return Statement(source, order, {}, trouble=f"its {source} is not a JSON object, so its alphas are unknown")
    kind = str(document.get("peft_type") or "LORA").upper().rpartition(".")[2]
    if kind not in ("LORA", "LOHA", "LOKR", OFT):
        return Statement(source, order, {})  # of another kind of adapter
    if kind != "LORA" and "alpha" in document:
        document["lora_alpha"] = document["alpha"]  # as PEFT names it for these
    settings: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        prefix, _, name = key.rpartition(".")
        settings.setdefault(prefix, {})[name] = value
    return Statement(source, order, settings)


def _config(config: Path) -> Statement:
    source = f"{CONFIG} beside it"
    try:
        text = untrusted.read(config, MAX_CONFIG_BYTES)
    except untrusted.Unreadable as error:
        return Statement(source, BESIDE, {}, trouble=f"the {source} {error}, so its alphas are unknown")
    return _json(source, BESIDE, text)


def _numbers(metadata: Mapping[str, str]) -> Iterator[Statement]:
    """One statement for each name of a number in the header; ranks and rslora beside them are read as theirs."""
    shared: dict[str, dict[str, str]] = {}
    named: dict[str, dict[str, dict[str, str]]] = {name: {} for name in _NUMBERS}
    for key, text in metadata.items():
        prefix, _, name = key.rpartition(".")
        value = text[:MAX_NUMBER_LETTERS + 1]  # one letter too many: no number
        if name == "alpha" and not _is_number(value):
            continue  # too plain a word to be sure of
        if name in named:
            named[name].setdefault(prefix, {})["lora_alpha"] = value
        elif name in ("r", "use_rslora"):
            shared.setdefault(prefix, {})[name] = value
    for name, settings in named.items():
        if name == "ss_network_alpha":  # with it kohya's dim, which convolutions need not have, and 0 for the rank
            if settings.get("", {}).get("lora_alpha", "").strip() not in ("", "0", "0.0"):
                yield Statement(f"{name} in the header", 3, {"": settings[""]}, plain=True, conv=_conv_alpha(metadata))
        elif settings:
            both = {prefix: values | shared.get(prefix, {}) for prefix, values in settings.items()}
            yield Statement(f"{name} in the header", 3, both, plain=True)


def _shown(value: Any) -> str:
    """A value of JSON as a short text, in time that does not depend on what it is: it is asked for by every module."""
    return type(value).__name__ if isinstance(value, dict | list) else str(value[:80] if isinstance(value, str) else value)


def _is_number(text: str) -> bool:
    try:
        return len(text) <= MAX_NUMBER_LETTERS and math.isfinite(float(text))
    except ValueError:
        return False


def _conv_alpha(metadata: Mapping[str, str]) -> str | None:
    try:
        arguments = untrusted.parse(metadata.get("ss_network_args", ""), odd_letters=True)
        return _shown(arguments["conv_alpha"])
    except (ValueError, KeyError, TypeError):
        return None


def _configs(path: Path) -> Iterator[tuple[Path, bool]]:
    """Each adapter_config.json beside a file, and whether it is certain to belong to it."""
    for folder in dict.fromkeys((path.parent, Path(path).resolve().parent)):
        config = folder / CONFIG
        try:
            if config.is_file():
                name = path.name if folder == path.parent else path.resolve().name
                yield config, _is_model(name) or not _model(folder) and len(_loras(folder)) == 1
        except OSError:
            continue


def _loras(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.lower().endswith(ENDING)]


def _is_model(name: str) -> bool:
    return name.lower() == f"adapter_model{ENDING}"


def _model(folder: Path) -> bool:
    return any(_is_model(name) for name in _loras(folder))
