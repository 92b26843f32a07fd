"""Sidecars: files that other managers of LoRAs put beside one, `owl.json` beside `owl.safetensors`. They are read, never written.

    owl.json             A1111 and Forge: what a user noted (activation text, preferred weight)
    owl.metadata.json    ComfyUI-Lora-Manager
    owl.civitai.info     Civitai Helper and others: a model version as Civitai describes it
    owl.preview.png      a picture; owl.png and other kinds of picture too

All of it is untrusted: sizes are bounded, markup is stripped, and no path or address in it is followed.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from composition import untrusted
from composition.loras.metadata import MAX_LETTERS, line
from composition.request import Category

TEXTS = (".json", ".metadata.json", ".civitai.info")  # what a user noted comes first
PICTURES = tuple(f"{middle}.{kind}" for middle in (".preview", "") for kind in ("png", "jpg", "jpeg", "webp"))
MAX_BYTES = 4 * 2**20  # of one: a model of Civitai with all its pictures has some 100,000
MAX_MARKUP = 200_000  # letters of a description with its markup
MAX_DESCRIPTION = 2000  # letters without it
MAX_WORDS, MAX_HASHES = 64, 64
MAX_WEIGHT = 10.0
_CATEGORIES = {word: word for word in get_args(Category) if word not in ("", "other")} | {
    "background": "place", "location": "place", "buildings": "place", "poses": "pose", "objects": "object", "celebrity": "character"}
_TAG = re.compile(r"(<[^<>]*>)")
_NAME = re.compile(r"</?\s*([A-Za-z][A-Za-z0-9]*)")
_HIDDEN = ("script", "style", "template", "head")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


@dataclass(frozen=True)
class Notes:
    """What sidecars say of a LoRA file. sha256: of the file that they are of. remarks: which of them cannot be read, and why."""

    title: str = ""
    category: str = ""
    base: str = ""
    triggers: tuple[str, ...] = ()
    description: str = ""
    tags: tuple[str, ...] = ()
    licence: str = ""
    weight: float | None = None
    sha256: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def names(stem: str) -> Sequence[str]:
    """The names under which sidecars of `stem`.safetensors may lie beside it."""
    return [stem + ending for ending in (*TEXTS, *PICTURES)]


def read(files: Sequence[Path]) -> Notes:
    """What these sidecars of one LoRA say together: of each thing the first that says it, of tags, trigger words and hashes all. Raises nothing."""
    notes = Notes()
    for file in files:
        notes = _joined(notes, _read(file))
    return notes


def _read(file: Path) -> Notes:
    try:
        document = untrusted.parse(untrusted.read(file, MAX_BYTES), odd_letters=True)
    except untrusted.Unreadable as error:
        return Notes(remarks=(line(f"{file.name} {error}, so it was not used", 500),))
    if not isinstance(document, dict):
        return Notes(remarks=(line(f"{file.name} is not a JSON object, so it was not used", 500),))
    if file.name.endswith(".civitai.info"):
        return _civitai(document)
    return _manager(document) if file.name.endswith(".metadata.json") else _a1111(document)


def _a1111(document: Mapping[str, Any]) -> Notes:
    return Notes(base=_named(document.get("sd version")), triggers=_words(_text(document.get("activation text"), MAX_DESCRIPTION).split(",")),
                 description=_prose(document.get("description"), document.get("notes")), weight=_weight(document.get("preferred weight")))


def _manager(document: Mapping[str, Any]) -> Notes:
    """Its own fields, then what it keeps of Civitai's."""
    try:
        tips = untrusted.parse(_raw(document.get("usage_tips")) or "{}", most=MAX_DESCRIPTION, odd_letters=True)
    except untrusted.Unreadable:
        tips = {}
    own = Notes(
        title=_text(document.get("model_name")), base=_named(document.get("base_model")), tags=_words(document.get("tags")),
        description=_prose(document.get("modelDescription"), document.get("notes")), sha256=_hashes([document]),
        weight=_strength(tips if isinstance(tips, dict) else {}))
    return _joined(own, _civitai(_table(document.get("civitai"))))


def _civitai(document: Mapping[str, Any]) -> Notes:
    model = _table(document.get("model"))
    tags = _words(model.get("tags"))
    files = [_table(file.get("hashes")) for file in map(_table, _list(document.get("files")))]
    return Notes(
        title=_text(model.get("name")), base=_named(document.get("baseModel")), triggers=_words(document.get("trainedWords")), tags=tags,
        category=_category(tags), description=_prose(model.get("description"), document.get("description")), licence=_licence(model),
        sha256=_hashes(files))


def _strength(tips: Mapping[str, Any]) -> float | None:
    """ComfyUI-Lora-Manager's recommended strength, else the middle of its range."""
    low, high = _weight(tips.get("strength_min")), _weight(tips.get("strength_max"))
    middle = (low + high) / 2 if low is not None and high is not None else None
    return _weight(tips.get("strength")) or middle


def _licence(model: Mapping[str, Any]) -> str:
    """Civitai's permissions in words."""
    parts = []
    uses = model.get("allowCommercialUse")
    if isinstance(uses, str | list):
        kinds = [kind for kind in _words([uses] if isinstance(uses, str) else uses) if kind.strip("{}").lower() not in ("", "none")]
        parts.append(f"commercial use: {', '.join(kinds).strip('{}') or 'no'}")
    for key, yes, no in (("allowNoCredit", "no credit needed", "credit needed"), ("allowDerivatives", "derivatives allowed", "no derivatives"),
                         ("allowDifferentLicense", "", "derivatives under the same terms")):  # fmt: skip
        if isinstance(value := model.get(key), bool):
            parts.append(yes if value else no)
    return line("; ".join(filter(None, parts)))


# values of strangers ---------------------------------------------------------------------------------------------------


def _joined(first: Notes, second: Notes) -> Notes:
    """Of each thing the first that says it; of lists both."""
    values: dict[str, Any] = {}
    for each in fields(Notes):
        mine, other = getattr(first, each.name), getattr(second, each.name)
        values[each.name] = tuple(dict.fromkeys((*mine, *other)))[:MAX_WORDS] if isinstance(mine, tuple) else other if mine in ("", None) else mine
    return Notes(**values)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value[:MAX_HASHES] if isinstance(value, list) else []


def _raw(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict) else ""


def _text(value: Any, most: int = MAX_LETTERS) -> str:
    """As it stands: trigger words may look like markup ("<s0><s1>")."""
    return line(value, most) if isinstance(value, str) else ""


def _named(value: Any) -> str:
    """A base's name, "" for words that say that nobody knows."""
    name = _text(value)
    return "" if name.lower() in ("unknown", "other", "none") else name


def _prose(*values: Any) -> str:
    """Descriptions one after another, without their markup."""
    texts = (line(plain(value[:MAX_MARKUP]), MAX_DESCRIPTION) for value in values if isinstance(value, str))
    return " ".join(dict.fromkeys(filter(None, texts)))[:MAX_DESCRIPTION]


def _words(values: Any) -> tuple[str, ...]:
    """The texts of a list, each once. Commas at their ends are not part of them."""
    words = (_text(value).strip(" ,") for value in (values if isinstance(values, list) else [])[: 4 * MAX_WORDS])
    return tuple(dict.fromkeys(filter(None, words)))[:MAX_WORDS]


def _weight(value: Any) -> float | None:
    """A number that can be a weight; None for 0, by which other tools mean that none is recommended."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_WEIGHT and math.isfinite(value)
    return float(value) or None if usable else None


def _hashes(tables: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    values = [table.get(key) for table in tables for key in ("sha256", "SHA256")]
    return tuple(dict.fromkeys(value.lower() for value in values if isinstance(value, str) and _SHA256.fullmatch(value)))[:MAX_HASHES]


def _category(tags: Sequence[str]) -> str:
    """The one of our categories that the tags name; "" when they name none or several."""
    named = {_CATEGORIES[tag.lower()] for tag in tags if tag.lower() in _CATEGORIES}
    return next(iter(named)) if len(named) == 1 else ""


def plain(markup: str) -> str:
    """The text of HTML, without tags, scripts and styles; entities are letters. Takes time linear in it."""
    parts, hidden = [], ""
    for piece in _TAG.split(markup):
        tag = _NAME.match(piece) if piece.startswith("<") and piece.endswith(">") else None
        if tag is None:
            parts += [] if hidden or piece.startswith("<!") else [piece]
            continue
        name = tag[1].lower()
        if hidden:
            hidden = "" if name == hidden and piece.startswith("</") else hidden
        elif name in _HIDDEN and not piece.endswith("/>") and not piece.startswith("</"):
            hidden = name
        else:
            parts.append(" " if name in ("p", "br", "div", "li", "ul", "ol", "tr", "td", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "img") else "")
    return html.unescape("".join(parts))
