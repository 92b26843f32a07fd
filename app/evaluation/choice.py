"""Cases whose LoRAs Medley itself chose for the prompt, as `medley generate --auto` does, in place of the set's own; and how well it chose."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.evaluation import testbed
from app.evaluation.cases import Case
from app.evaluation.metrics import CHOICE, Metric
from app.evaluation.sections import Section, intervals
from app.evaluation.summary import parts_of
from app.evaluation.testbed import Entry
from app.suggestions import composed
from composition import Lora, Refused
from retrieval.suggest import MOST

if TYPE_CHECKING:
    from app.lora_library import Library

SET, RETRIEVAL = "set", "retrieval"  # who chooses the LoRAs
SUGGESTION = "suggestion"  # the row of the table
COLUMNS = (
    Metric("precision", "Precision", "share of the LoRAs chosen that are of the set; prompts for which none was chosen are left out", share=True, digits=1),
    Metric("recall", "Recall", "share of the set's LoRAs that were chosen", share=True, digits=1),
    Metric("exact", "Exact", "share of prompts for which exactly the set's LoRAs were chosen", share=True, digits=1),
    Metric("chosen", "Chosen", "LoRAs chosen for a prompt"),
)


def by_retrieval(
    cases: Sequence[Case], table: Mapping[str, Sequence[Entry]], library: "Library", find: Callable[[str], Path], *, weight: float
) -> list[Case]:  # fmt: skip
    """The cases with the LoRAs that the library suggests for their prompts, all at one weight; the concepts expected stay the set's.

    At most as many as the largest set has, or as --auto takes where that is more. Those of the testbed come first, in its order and as a set has them,
    so that where the choice is right the request is the same as by the set. A missing trigger word is added to the prompt. find: the file of a
    LoRA's name; raises Refused.
    """
    entries = {}
    for entry in (entry for rows in table.values() for entry in rows):
        with suppress(Refused, OSError):
            entries[find(entry.id).resolve()] = entry
    most = max([MOST, *(case.size for case in cases)])
    chosen: dict[str, tuple[str, tuple[Lora, ...]]] = {}
    for case in cases:
        if case.request and case.request.prompt not in chosen:
            chosen[case.request.prompt] = _chosen(case, entries, library, most, weight)
    return [replace(case, own=tuple(case.request.loras), request=replace(case.request, prompt=chosen[case.request.prompt][0],
                                                                         loras=chosen[case.request.prompt][1]))
            for case in cases if case.request]  # fmt: skip


def _chosen(case: Case, entries: Mapping[Path, Entry], library: "Library", most: int, weight: float) -> tuple[str, tuple[Lora, ...]]:
    """The prompt with missing trigger words, and the LoRAs."""
    assert case.request
    request, suggestions = composed(replace(case.request, loras=()), library, None, most=most)
    of_file = {str(library.path(each)): next((entries[path.resolve()] for path in library.paths(each) if path.resolve() in entries), None)
               for each in suggestions}  # fmt: skip
    place = {entry.id: index for index, entry in enumerate(entries.values())}
    known = sorted({entry.id: entry for entry in of_file.values() if entry}.values(), key=lambda entry: place[entry.id])
    strange = [replace(lora, weight=weight) for lora in request.loras if of_file[lora.source] is None]
    return request.prompt, (*(testbed.lora(entry, weight) for entry in known), *strange)


def section(cases: Sequence[Case], **resampling: int) -> Section | None:
    """How often the right LoRAs were chosen, over prompts; None where the sets chose. resampling: `resamples` and `seed`."""
    prompts = {case.group: case for case in cases if case.own}  # a set's seeds have one prompt
    rows = [{"group": group, "size": case.size, **quality(_sources(case.request.loras if case.request else ()), _sources(case.own))}
            for group, case in prompts.items()]  # fmt: skip
    tables = {name: {SUGGESTION: intervals(some, COLUMNS, lambda row, column: row.get(column.key), **resampling)} for name, some in parts_of(rows).items()}
    about = ("The LoRAs of every picture are those that Medley suggests for its prompt, as medley generate --auto does; the concepts expected "
             "are those of the set that the prompt was written for. Means over prompts.")  # fmt: skip
    return Section.of(CHOICE, "Chosen by retrieval", about, COLUMNS, tables)


def _sources(loras: Sequence[Lora]) -> set[str]:
    return {lora.source for lora in loras}


def quality(chosen: set[str], own: set[str]) -> dict[str, float]:
    """By key of COLUMNS, for one prompt; no precision where none was chosen."""
    right = len(chosen & own)
    values = {"recall": right / len(own), "exact": float(chosen == own), "chosen": float(len(chosen))}
    return ({"precision": right / len(chosen)} if chosen else {}) | values
