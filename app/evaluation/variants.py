"""The ways an evaluation compares: the prompt alone, each method, and each dearer method at the cost of the plain one."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app import options
from app.evaluation.cases import Case
from composition import Refused, Request

NONE, GIVEN, EQUAL = "none", "given", "@equal"
MEASURED = ("change", "level")  # values of the option order that a profile answers
MANY = 1.05  # times the prompt alone's evaluations, from which a way is also made at equal evaluations


@dataclass(frozen=True)
class Row:
    """One picture to be: a case answered in one way. request None: the picture was given."""

    case: Case
    way: str
    request: Request | None = None
    picture: Path | None = None

    @property
    def title(self) -> str:
        return f"{self.way} {self.case.group}"


@dataclass(frozen=True)
class Ways:
    """Ways with their methods' options, and the factor on every LoRA's weight that tuning found for (way, size).

    A way is a method's name, or that and options after it: "cmlora:cache=false". pin: writes the measured order of its LoRAs
    into a request, for the options order=change and order=level.
    """

    options: Mapping[str, Mapping[str, Any]]
    factors: Mapping[tuple[str, int], float] = field(default_factory=dict)
    pin: Callable[[Request], Request] | None = None

    def rows(self, case: Case) -> list[Row]:
        """The prompt alone first, then every method."""
        return [self.alone(case), *(self.row(case, name) for name in self.options)]

    def alone(self, case: Case) -> Row:
        assert case.request
        return Row(case, NONE, replace(case.request, loras=(), method="merge", options={}))

    def row(self, case: Case, name: str, factor: float | None = None) -> Row:
        assert case.request
        factor = self.factors.get((name, case.size), 1.0) if factor is None else factor
        loras = [lora.scaled(factor) for lora in case.request.loras]
        request = replace(case.request, loras=loras, method=method_of(name), options=self.options[name])
        measured = self.pin is not None and request.options.get("order") in MEASURED
        return Row(case, name, self.pin(request) if measured and self.pin else request)


def equal(row: Row, evaluations: int, plain: int) -> Row | None:
    """The same with as many steps as make its evaluations those of the prompt alone; None where they are already.

    plain: evaluations of the prompt alone. A method that asks K LoRAs in each of T steps gets about T / K steps: what it is
    worth at Merge's cost.
    """
    if row.request is None or row.way == NONE or evaluations <= MANY * plain:
        return None
    return Row(row.case, row.way + EQUAL, replace(row.request, steps=max(1, round(row.request.length * plain / evaluations))))


def method_of(way: str) -> str:
    """The method of a way: "cmlora" of "cmlora:cache=false"."""
    return way.removesuffix(EQUAL).partition(":")[0]


def title(way: str) -> str:
    """What a way is called in tables."""
    from composition import methods

    if way == NONE:
        return "Prompt only"
    if way.endswith(EQUAL):
        return f"{title(way.removesuffix(EQUAL))}, equal evaluations"
    name, _, options = way.partition(":")
    known = methods.all()
    return f"{known[name].title} {options.replace(':', ' ')}".strip() if name in known else way


def read_methods(text: str, shared: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Way to options, from "merge,cmlora,cmlora:cache=false"; `none` is left out: it is always there.

    shared: key=value pairs for all methods that have them; a way's own come over them. Raises Refused for an unknown one.
    """
    from composition import methods

    ways = dict.fromkeys(name for part in text.split(",") if (name := part.strip()) and name != NONE)
    names = {way: methods.find(method_of(way)).name for way in ways}
    common = options.options_of_each(shared, list(dict.fromkeys(names.values()))) if shared else {}
    own = {way: options.options(way.split(":")[1:], name) for way, name in names.items()}
    return {way: {**common.get(name, {}), **own[way]} for way, name in names.items()}


def numbers(text: str, flag: str) -> list[int]:
    """"2,3" or "2-5" as numbers in order. Raises Refused."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})\s*(?:-\s*(\d{1,3})\s*)?", part)
        if not match or match[2] and int(match[2]) < int(match[1]):
            raise Refused(f"{flag} {text}: write numbers, as 2,3,4 or 2-5")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def interleaved(cases: Sequence[Case], limit: int | None) -> list[Case]:
    """At most `limit` cases, taken in turn from each size; all of them without a limit. In the order given."""
    if limit is None or limit >= len(cases):
        return list(cases)
    by_size: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        by_size.setdefault(case.size, []).append(index)
    turns = [index for turn in range(len(cases)) for rows in by_size.values() for index in rows[turn : turn + 1]]
    return [cases[index] for index in sorted(turns[:limit])]
