"""Distractors: LoRAs that are loaded and that the prompt does not name. Does the concept asked for survive them, and do they show?

Each case asks for one concept of a testbed, the target, by its own prompt. It is compared with the same prompt and noise by its LoRA alone, and
what is seen of the distractors with what the judge sees of them in the picture without any LoRA.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import comb
from typing import Any

from app.evaluation import statistics, testbed
from app.evaluation.cases import Case, Key, key
from app.evaluation.metrics import DISTRACTORS, METRICS, Metric
from app.evaluation.sections import Rows, Section
from app.evaluation.statistics import Interval
from app.evaluation.testbed import Entry, Set
from app.evaluation.variants import LORA_ALONE, NONE
from composition import Refused, Request
from composition.prompts import says

TRIED = 500  # sets of distractors that are compared for each set that is drawn
KEPT = Metric("kept", "Kept", "presence, as a share of the presence that the LoRA alone has with the same prompts and noise", share=True, digits=1)
LOST = Metric("lost", "Lost", "of the pictures in which the LoRA alone shows the concept, the share in which this variant does not", larger=False,
              share=True, digits=1)  # fmt: skip
ADDED = Metric("added", "More than the base", "distractors present, less those that the judge finds in the picture without any LoRA", larger=False,
               share=True, digits=1)  # fmt: skip
PRESENT = {metric.key: metric for metric in METRICS if metric.key in ("presence", "distractor_presence")}


def drawn(table: Mapping[str, Sequence[Entry]], count: int, sets: int, seed: int = 0, of: str = "") -> list[tuple[Entry, Set]]:
    """Targets, each with `count` distractors: so many different sets, or all there are.

    Every LoRA is a target equally often, give or take one. The distractors are of its own and of other categories, where count is 2 or more and
    there are such, of as many categories as can be, and of those that are equally good, LoRAs that were used less. A LoRA that the target's prompt
    names is no distractor of it. The order is fixed by the seed and a smaller number of sets is the beginning of a larger one. of: the category
    that all are of. Raises Refused when a target has too few.
    """
    entries = [entry for category, rows in table.items() if of in ("", category) for entry in rows]
    others = {entry.id: [other for other in entries if other is not entry and not _named(other, prompt(entry))] for entry in entries}
    most = min(map(len, others.values()), default=0)
    if not 1 <= count <= most:
        kind = f" of {of}" if of else ""
        raise Refused(f"--distractors {count}: " + (f"choose from 1 to {most}, as many LoRAs{kind} as this testbed has besides any one that its prompt "
                                                    f"does not name" if most else f"this testbed has no LoRAs{kind} that could be loaded besides another"))  # fmt: skip
    rng, used, taken, chosen = random.Random(f"{seed}/distractors/{count}"), Counter[str](), set(), []
    rng.shuffle(entries)
    while entries and len(chosen) < sets:
        for target in tuple(entries):
            several = [each for each in _several(others[target.id], count, rng) if (target.id, frozenset(map(str, each))) not in taken]
            if not several:
                entries.remove(target)  # all its sets are drawn
                continue
            best = min(several, key=lambda each: (*_sameness(target, each, others[target.id]), sum(used[entry.id] for entry in each)))
            taken.add((target.id, frozenset(map(str, best))))
            used.update(entry.id for entry in best)
            chosen.append((target, best))
            if len(chosen) == sets:
                break
    return chosen


def _several(entries: Sequence[Entry], count: int, rng: random.Random) -> Iterator[Set]:
    """All sets of this size, or some of them."""
    if comb(len(entries), count) <= TRIED:
        return iter(rng.sample(every := list(combinations(entries, count)), len(every)))
    return (tuple(rng.sample(entries, count)) for _ in range(TRIED))


def _sameness(target: Entry, several: Set, others: Sequence[Entry]) -> tuple[int, int]:
    """How far a set is from both kinds of categories, the target's and others, and how many of it are of one category: less is better."""
    kinds, there = Counter(entry.category for entry in several), {entry.category == target.category for entry in others}
    return len(there - {kind == target.category for kind in kinds}), max(kinds.values())


def _named(entry: Entry, text: str) -> bool:
    return any(says(text, words) for words in entry.triggers)


def prompt(target: Entry) -> str:
    """That asks for the target by itself."""
    return target.concept.alone


def cases(
    several: Sequence[tuple[Entry, Set]], seeds: int, like: Request, table: Mapping[str, Sequence[Entry]], *, weight: float = 1.0, prefix: str = "",
    pilot: bool = False,
) -> list[Case]:  # fmt: skip
    """Each set with each seed number, its LoRAs in the order of the table. Otherwise as `testbed.cases`."""
    place = {entry.id: index for index, entry in enumerate(entry for rows in table.values() for entry in rows)}
    of_sets = []
    for target, distractors in several:
        text, group = prompt(target), f"{target} among {'+'.join(sorted(map(str, distractors), key=place.__getitem__))}"
        loras = [testbed.lora(entry, weight) for entry in sorted((target, *distractors), key=lambda entry: place[entry.id])]
        for number in range(seeds):
            request = replace(like, prompt=f"{prefix}{text}", loras=loras, seed=testbed.noise(group, number, pilot), count=1)
            of_sets.append(Case(group, number, text, (target.concept,), request, distractors=tuple(entry.concept for entry in distractors)))
    return of_sets


def section(parts: Mapping[str, Rows], variants: Sequence[str], **resampling: int) -> Section | None:
    """What is kept of the target and what shows of the distractors, by variant; None where no case has distractors.

    parts: names of parts of the pictures to their rows. resampling: `resamples` and `seed`.
    """
    tables: dict[str, dict[str, dict[str, Interval]]] = {}
    for name, rows in parts.items():
        by: dict[str, dict[Key, Mapping[str, Any]]] = {}
        for row in rows:
            if row["distractors"]:
                by.setdefault(row["variant"], {})[key(row)] = row
        tables[name] = {variant: _cells(by[variant], by.get(LORA_ALONE, {}), by.get(NONE, {}), resampling) for variant in variants if variant in by}
    about = ("One concept is asked for; the other LoRAs of a set are loaded and not named. Kept: presence over that of the LoRA alone, with the same "
             "prompts and noise; more than 100 % is more than the LoRA alone has. What the judge finds of distractors in pictures without any LoRA is its "
             "error, or what the base draws by itself.")  # fmt: skip
    return Section.of(DISTRACTORS, "Distractors", about, (PRESENT["presence"], KEPT, LOST, PRESENT["distractor_presence"], ADDED), tables)


Mine = Mapping[Key, Mapping[str, Any]]


def _cells(mine: Mine, alone: Mine, base: Mine, resampling: Mapping[str, int]) -> dict[str, Interval]:
    """One variant's. mine, alone, base: rows by case."""
    cells = {name: _mean({case: row[name] for case, row in mine.items() if row[name] is not None}, resampling) for name in PRESENT}
    both = {case: (mine[case]["presence"], alone[case]["presence"]) for case in mine if case in alone}
    both = {case: pair for case, pair in both.items() if None not in pair}
    if any(reference for _, reference in both.values()):
        values, references = zip(*both.values(), strict=True)
        cells["kept"] = statistics.ratio(values, references, [group for group, *_ in both], **resampling)
    cells["lost"] = _mean({case: float(not value) for case, (value, reference) in both.items() if reference}, resampling)
    shown = {case: (mine[case]["distractor_presence"], base[case]["distractor_presence"]) for case in mine if case in base}
    cells["added"] = _mean({case: value - without for case, (value, without) in shown.items() if None not in (value, without)}, resampling)
    return {name: cell for name, cell in cells.items() if cell is not None}


def _mean(values: Mapping[Key, float], resampling: Mapping[str, int]) -> Interval | None:
    return statistics.interval(list(values.values()), [group for group, *_ in values], **resampling) if values else None
