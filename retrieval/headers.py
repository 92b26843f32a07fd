"""A LoRA file -> its card: from the header and the sidecars alone, and what only the whole file tells."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from composition import untrusted
from composition.loras import condition, controls, family, keys, library, metadata, reader
from composition.loras.kinds.lora import Factors
from composition.loras.metadata import line
from composition.loras.safetensors import NotNow, SafeFile, load_header, load_safely
from retrieval import sidecars, singular
from retrieval.cards import IN_HEADER, Card, Trigger, distinct
from retrieval.sidecars import MAX_DESCRIPTION, MAX_WORDS, Notes

MAX_TRAINING_TAGS = 32
MAX_TAG_BYTES = 8 * 2**20  # of ss_tag_frequency
TAG_DEPTH = 4  # of folders and subsets around its numbers
_BASES = ("base", "ss_base_model_version", "modelspec.architecture")
_PREVIEWS = ("preview", "modelspec.thumbnail")


class Content(NamedTuple):
    """The part of a card that depends on the bytes of the file alone (and on an adapter_config.json beside it)."""

    sha256: str = ""
    tensor_sha256: str = ""
    data_sha256: str = ""
    alphas: Mapping[float, int] = {}
    no_effect: int = 0
    strength: float | None = None
    effective_rank: float | None = None
    spike: float | None = None
    remarks: tuple[str, ...] = ()
    trouble: str = ""

    def text(self) -> str:
        return json.dumps(self._asdict(), separators=(",", ":"))


def content(text: str) -> Content:
    """From `Content.text`. Raises ValueError, KeyError or TypeError for what is none."""
    values = json.loads(text)
    return Content(**values | {"alphas": {float(alpha): count for alpha, count in values["alphas"].items()}, "remarks": tuple(values["remarks"])})


def describe(path: Path, files: Sequence[Path] = (), picture: Path | None = None) -> Card:
    """What a file's header and these sidecars tell; a file that cannot be read has `trouble`. picture: its preview beside it. Raises nothing."""
    notes = sidecars.read(files)
    try:
        raw = load_header(path)
        card = _built(path, raw)
    except Exception as error:  # one file, whatever is wrong with it, does not take the others down
        return _worded(Card(path, trouble=line(library.trouble(error), 500)), {}, notes, picture)
    return _worded(card, raw.metadata, notes, picture)


def load(path: Path) -> tuple[Content, SafeFile | None, Mapping[str, Factors]]:
    """What only a file's numbers tell, the file, and its factors (`reader.unplaced`); None and none for one that cannot be used. Raises NotNow
    alone, for one that may be read another time."""
    try:
        raw = load_safely(path)
    except NotNow:
        raise
    except Exception as error:  # one file, whatever is wrong with it, does not take the others down
        return Content(trouble=line(library.trouble(error), 500)), None, {}
    whole = Content(raw.sha256, raw.tensor_sha256, raw.data_sha256)
    try:
        receipt, factors = reader.inspect(path, raw), reader.unplaced(path, raw)
        of = singular.figures(factors)
    except MemoryError as error:
        raise NotNow(f"{path.name} cannot be read: no memory for it") from error
    except Exception as error:  # an alpha that is no number, numbers that overflow
        return whole._replace(trouble=line(library.trouble(error), 500)), None, {}
    return whole._replace(alphas=dict(receipt.alphas), no_effect=len(receipt.no_effect), remarks=receipt.remarks, strength=of.strength,
                          effective_rank=of.effective_rank, spike=of.spike), raw, factors


def completed(card: Card, whole: Content) -> Card:
    """The card with what the numbers of its file tell. What its header says against using it stays."""
    remarks = (*card.remarks, *whole.remarks)
    if card.stated_sha256 and whole.sha256 and whole.sha256 not in card.stated_sha256:
        remarks = (*remarks, "what lies beside it is of another file: its sha256 is another")
    return replace(card, **whole._replace(remarks=remarks, trouble=card.trouble or whole.trouble)._asdict())


def training_tags(header: Mapping[str, str]) -> Iterator[str]:
    """The words of kohya's ss_tag_frequency, the most frequent first, then as they stand."""
    try:
        table = untrusted.parse(header.get("ss_tag_frequency") or "{}", most=MAX_TAG_BYTES, odd_letters=True)
    except untrusted.Unreadable:
        return
    counts: Counter[str] = Counter()
    waiting: list[tuple[Any, int]] = [(table, 0)]
    while waiting:
        value, depth = waiting.pop()
        for key, inside in value.items() if isinstance(value, dict) else ():
            if isinstance(inside, dict) and depth < TAG_DEPTH:
                waiting.append((inside, depth + 1))
            elif type(inside) is int and 0 < inside < 2**53:
                counts[key] += inside
    yield from filter(None, (line(word).strip(" ,") for word, _ in counts.most_common(4 * MAX_TRAINING_TAGS)))


def _built(path: Path, raw: SafeFile) -> Card:
    """What the names and shapes of a file's tensors say."""
    updates, ignored = keys.modules(raw.tensors)
    usable = [module for module in updates if reader.is_whole(module, raw.tensors)]
    blocked = Counter(module.blocked for module in updates if module.blocked)
    layouts = Counter(module.layout for module in updates).most_common()
    return Card(
        path, family=family.detect(updates, raw.tensors).family, layout=" + ".join(layout for layout, _ in layouts), tensors=len(raw.tensors),
        ranks=dict(Counter(ranked[0] for module in usable if (ranked := reader.ranked(module, raw.tensors)))),
        coverage=dict(Counter(module.component or "unknown" for module in usable)),
        trouble=_obstacle(path, raw, bool(usable), blocked, ignored),
        remarks=tuple(f"{count} of its layers cannot be applied: {reason}" for reason, count in blocked.most_common()) if usable else ())


def _obstacle(path: Path, raw: SafeFile, usable: bool, blocked: Mapping[str, int], ignored: Mapping[str, Sequence[str]]) -> str:
    """Why a file is no use as a LoRA, "" for one that is. usable: it has a layer that can be applied."""
    with_a_picture = f"which goes with a picture: --control {line(path.stem)}=PICTURE"
    if condition.is_one(list(raw.tensors)):
        return f"is a condition LoRA, {with_a_picture}"
    if not usable or any(name.endswith(controls.WIDENED) for name in raw.tensors):
        sort = controls.recognise(path)
        if sort.trouble or sort.kind:
            return sort.trouble or f"is a {'ControlNet' if sort.kind == 'controlnet' else 'control LoRA'}, {with_a_picture}"
    if usable:
        return ""
    if blocked:
        return f"none of its layers can be applied: {'; '.join(blocked)}"
    reasons = "; ".join(f"{reason} (as {line(names[0], 80)!r})" for reason, names in ignored.items() if names) or "no pair of factors in it is complete"
    return f"is no LoRA file that is known: {reasons}"


def _worded(card: Card, header: Mapping[str, str], notes: Notes, picture: Path | None) -> Card:
    """With what the header and the sidecars say. A sidecar's title counts more than a header's, in which trainers repeat the file's name."""
    alias = metadata.alias(header)
    titles = (header.get("title", ""), notes.title, header.get("modelspec.title", ""))
    title = next((line(title) for title in titles if title.strip() and line(title) not in (card.path.stem, alias)), "")
    category = metadata.category(header) or notes.category
    triggers = (
        *(Trigger(word, "header") for word in metadata.triggers(header)), *(Trigger(word, "sidecar") for word in notes.triggers),
        *(Trigger(word, "training tags") for word in islice(training_tags(header), MAX_TRAINING_TAGS)))
    tags = (*(line(tag) for tag in header.get("modelspec.tags", "").split(",")[:MAX_WORDS]), *notes.tags)
    return replace(
        card, title=title, alias=alias, category=category, base=notes.base or _first(header, *_BASES), triggers=distinct(triggers),
        description=notes.description or _first(header, "modelspec.description", "description", "ss_training_comment", most=MAX_DESCRIPTION),
        tags=tuple(dict.fromkeys(filter(None, tags))), licence=_first(header, "licence", "license", "modelspec.license") or notes.licence,
        preview=str(picture) if picture else IN_HEADER if _first(header, *_PREVIEWS) else "", weight=notes.weight,
        stated_sha256=notes.sha256, remarks=(*card.remarks, *notes.remarks))


def _first(header: Mapping[str, str], *names: str, most: int = metadata.MAX_LETTERS) -> str:
    """The first of these that a header has, as one line."""
    return next((text for name in names if (text := line(header.get(name, ""), most)) not in ("", "None", "null")), "")
