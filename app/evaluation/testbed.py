"""A testbed: LoRAs by category in ComposLoRA's form, and the sets drawn from it (arXiv 2402.16843, section 4.1).

A set is one character and at most one LoRA of each other category. The file is ComposLoRA's own `*_lora_info.json`: category
to entries of id, name, trigger (a list) and url. Ours also have `phrase`, `concept` and `alone`; without them the prompt is
all triggers joined by commas, as theirs is.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

from app.evaluation.cases import Case, ExpectedConcept
from composition import Lora, Refused, Request, bundled, untrusted
from composition.bundled import BUNDLES
from composition.request import Category

CATEGORIES = {"background": "place"}  # where ComposLoRA's word is not ours
PILOT = "tuning"  # the cases that weights are tuned on have seeds of their own


@dataclass(frozen=True)
class Entry:
    """One LoRA of a testbed: the name it is found by, what it is, and the words that call it."""

    id: str
    name: str
    category: str
    triggers: tuple[str, ...]
    phrase: str
    concept: ExpectedConcept

    def __str__(self) -> str:
        return self.id


Set = tuple[Entry, ...]


def read(source: str) -> dict[str, list[Entry]]:
    """Category to entries, from a bundled name or a file. Raises Refused with the entry that is wrong."""
    path = bundled.path(BUNDLES[source].testbed) if source in BUNDLES else Path(source)
    if not path.is_file():
        raise Refused(f"--testbed {source}: there is no such file; give {' or '.join(BUNDLES)}, or a *_lora_info.json file")
    try:
        document = untrusted.parse_file(path)
    except untrusted.Unreadable as error:
        raise Refused(f"--testbed {source}: the file {error}") from None
    if not isinstance(document, dict) or not all(isinstance(rows, list) for rows in document.values()):
        raise Refused(f"--testbed {source}: expected categories with lists of LoRAs, as in ComposLoRA's *_lora_info.json")
    if not document.get("character"):
        raise Refused(f'--testbed {source}: it has no "character"; every set has exactly one')
    table = {category: [_entry(row, category, source, k) for k, row in enumerate(rows)] for category, rows in document.items()}
    double = [name for name, times in Counter(entry.id for rows in table.values() for entry in rows).items() if times > 1]
    if double:
        raise Refused(f"--testbed {source}: two LoRAs have the id {double[0]!r}")
    return table


def _entry(row: Any, category: str, source: str, number: int) -> Entry:
    where = f"--testbed {source}: {category} number {number + 1}"
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not row["id"]:
        raise Refused(f"{where} needs an id: the name its LoRA file is found by")
    triggers = row.get("trigger", [])
    triggers = [triggers] if isinstance(triggers, str) else triggers
    if not isinstance(triggers, list) or not triggers or not all(isinstance(word, str) and word.strip() for word in triggers):
        raise Refused(f"{where} ({row['id']}) needs its trigger: a list of words")
    texts = {key: row.get(key, "") for key in ("name", "phrase", "concept", "alone")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise Refused(f"{where} ({row['id']}): name, phrase, concept and alone are texts")
    joined = ", ".join(word.strip() for word in triggers)
    kind = CATEGORIES.get(category, category)
    concept = ExpectedConcept(row["id"], texts["concept"] or joined, kind, texts["alone"] or joined)
    return Entry(row["id"], texts["name"] or row["id"], kind, tuple(triggers), texts["phrase"], concept)


def sets(table: dict[str, list[Entry]], size: int, of: str = "") -> list[Set]:
    """Every set of this size, in the order of the file. of: a category of which all of the set are, in place of one character
    and others."""
    if of:
        if of not in table or not 1 <= size <= len(table[of]):
            known = ", ".join(f"{category} ({len(rows)})" for category, rows in table.items() if rows)
            raise Refused(f"--of {of} --loras {size}: this testbed has {known}")
        return list(combinations(table[of], size))
    others = [category for category in table if category != "character" and table[category]]
    if not 1 <= size <= len(others) + 1:
        raise Refused(f"--loras {size}: sets of this testbed have 1 to {len(others) + 1} LoRAs")
    return [tuple(chosen) for several in combinations(others, size - 1)
            for chosen in product(table["character"], *(table[category] for category in several))]  # fmt: skip


def drawn(table: dict[str, list[Entry]], size: int, count: int | None, seed: int = 0, of: str = "") -> list[Set]:
    """`count` sets of this size (None: all), drawn so that LoRAs appear about equally often.

    The order is fixed by the seed and a smaller count is the beginning of a larger one.
    """
    left = sets(table, size, of)
    random.Random(f"{seed}/{size}").shuffle(left)
    if count is None or count >= len(left):
        return left
    used: Counter[str] = Counter()
    chosen = []
    for _ in range(count):
        best = min(left, key=lambda each: sum(used[entry.id] for entry in each))  # the first of equals: as shuffled
        left.remove(best)
        chosen.append(best)
        used.update(entry.id for entry in best)
    return chosen


def prompt(chosen: Set) -> str:
    """The phrases one after the other, those of one category as "a, b and c"; where an entry has none, all triggers joined by
    commas."""
    if len(chosen) > 1 and all(entry.phrase and entry.category == chosen[0].category for entry in chosen):
        phrases = [entry.phrase.strip().removeprefix("and ") for entry in chosen]
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    if all(entry.phrase for entry in chosen):
        return "".join(entry.phrase for entry in chosen).strip()
    return ", ".join(word.strip() for entry in chosen for word in entry.triggers)


def noise(group: str, number: int, pilot: bool = False) -> int:
    """The seed of the generator for this set and seed number, the same for every method."""
    return random.Random(f"{PILOT if pilot else 'noise'}/{group}/{number}").randrange(2**32)


def cases(
    several: Sequence[Set], seeds: int, like: Request, *, weight: float = 1.0, prefix: str = "", pilot: bool = False,
    boxes: bool = False,
) -> list[Case]:
    """Each set with each seed number. like: the request's other settings. prefix: put before the prompt, never scored. boxes:
    the LoRAs' regions are columns of equal width, in the order of the set."""
    of_sets = []
    for chosen in several:
        text, group = prompt(chosen), "+".join(map(str, chosen))
        columns = [(k / len(chosen), 0.0, (k + 1) / len(chosen), 1.0) if boxes else None for k in range(len(chosen))]
        loras = [lora(entry, weight, column) for entry, column in zip(chosen, columns, strict=True)]
        for number in range(seeds):
            request = replace(like, prompt=f"{prefix}{text}", loras=loras, seed=noise(group, number, pilot), count=1)
            of_sets.append(Case(group, number, text, tuple(entry.concept for entry in chosen), request))
    return of_sets


def lora(entry: Entry, weight: float, region: tuple[float, float, float, float] | None = None) -> Lora:
    """An entry's LoRA as a request has it."""
    return Lora(entry.id, weight=weight, triggers=entry.triggers, category=_category(entry.category), region=region)


def _category(name: str) -> Any:
    """A category a Lora may have."""
    return name if name in get_args(Category) else "other"
