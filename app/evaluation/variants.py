"""The variants an evaluation compares: the prompt alone, the LoRA asked for alone where there are distractors, each method, and each dearer method at
the cost of the plain one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app import options
from app.evaluation.cases import Case
from composition import Refused, Request, prompt_syntax

# Options of every method, which are fields of the request: by what is written, their values.
OF_REQUEST: dict[str, dict[str, Any]] = {"anchored": {"true": True, "false": False}, "windows": {"both": "both", "style": "style", "none": ""},
                                         "named": {"true": True, "false": False}}
FIELDS = {"named": "named_only"}  # of the request, where its name is another
NONE, LORA_ALONE, SUPPLIED, EQUAL = "none", "lora-alone", "supplied", "@equal"
REFERENCES = (NONE, LORA_ALONE)  # the variants that methods are compared with: no methods themselves
MANY = 1.05  # times the prompt alone's evaluations, from which a variant is also made at equal evaluations


@dataclass(frozen=True)
class Row:
    """One picture to be: a case by one variant. request None: the picture came with the manifest."""

    case: Case
    variant: str
    request: Request | None = None
    picture: Path | None = None


@dataclass(frozen=True)
class Variants:
    """Variants with their methods' options, and the factor on every LoRA's weight that tuning found for (variant, size, steps).

    A variant is a method's name, or that and options after it: "cmlora:cache=false", "merge:anchored=true" (OF_REQUEST).
    """

    options: Mapping[str, Mapping[str, Any]]
    factors: Mapping[tuple[str, int, int], float] = field(default_factory=dict)

    def rows(self, case: Case) -> list[Row]:
        """The prompt alone first, then the LoRA alone where there are others that the prompt does not name, then every method."""
        return [self.prompt_alone(case), *([self.lora_alone(case)] if case.distractors else []), *(self.row(case, name) for name in self.options)]

    def prompt_alone(self, case: Case) -> Row:
        assert case.request
        return Row(case, NONE, replace(case.request, prompt=prompt_syntax.untagged(case.request.prompt)[0], loras=(), method="merge", options={}))

    def lora_alone(self, case: Case) -> Row:
        """The LoRA of the concept asked for, at its weight, without the distractors."""
        assert case.request
        loras = [lora for lora in case.request.loras if lora.source == case.concepts[0].name]
        return Row(case, LORA_ALONE, replace(case.request, loras=loras, method="merge", options={}))

    def row(self, case: Case, name: str, factor: float | None = None) -> Row:
        """The case by a variant; without LoRAs (none may have been chosen) there is nothing to compose."""
        assert case.request
        if not case.request.loras:
            return Row(case, name, replace(case.request, method="merge", options={}))
        factor = self.factors.get((name, case.size, case.steps), 1.0) if factor is None else factor
        loras = [lora.scaled(factor) for lora in case.request.loras]
        return Row(case, name, replace(case.request, loras=loras, method=method_of(name), options=self.options[name], **fields_of(name)))


def equal(row: Row, settled: Request, evaluations: int, plain: int) -> Row | None:
    """The same with as many steps as make its evaluations those of the prompt alone; None where they are already.

    settled: its request with the model's own steps. plain: evaluations of the prompt alone. A method that asks K LoRAs in each of T steps gets about T / K steps: what it is
    worth at Merge's cost.
    """
    if row.variant in REFERENCES or evaluations <= MANY * plain:
        return None
    return Row(row.case, row.variant + EQUAL, replace(settled, steps=max(1, round(settled.length * plain / evaluations))))


def method_of(variant: str) -> str:
    """The method of a variant: "cmlora" of "cmlora:cache=false"."""
    return variant.removesuffix(EQUAL).partition(":")[0]


def fields_of(variant: str) -> dict[str, Any]:
    """The fields of the request that a variant sets: {"anchored": True} of "merge:anchored=true". Raises Refused for another value."""
    pairs = [part.partition("=") for part in variant.removesuffix(EQUAL).split(":")[1:]]
    texts = {key.strip(): value.strip().lower() for key, _, value in pairs if key.strip() in OF_REQUEST}
    if strange := [key for key, value in texts.items() if value not in OF_REQUEST[key]]:
        raise Refused(f"{variant:.200}: write {' or '.join(f'{strange[0]}={value}' for value in OF_REQUEST[strange[0]])}")
    return {FIELDS.get(key, key): OF_REQUEST[key][value] for key, value in texts.items()}


def title(variant: str) -> str:
    """What a variant is called in tables."""
    from composition import methods

    if variant == NONE:
        return "Prompt only"
    if variant == LORA_ALONE:
        return "LoRA alone"
    if variant.endswith(EQUAL):
        return f"{title(variant.removesuffix(EQUAL))}, equal evaluations"
    name, _, options = variant.partition(":")
    known = methods.all()
    return f"{known[name].title} {options.replace(':', ' ')}".strip() if name in known else variant


def read_methods(text: str, shared: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Variant to options, from "merge,cmlora,cmlora:cache=false"; `none` is left out: it is always there.

    shared: key=value pairs for all methods that have them; a variant's own come over them. Raises Refused for an unknown one.
    """
    from composition import methods

    variants = dict.fromkeys(name for part in text.split(",") if (name := part.strip()) and name != NONE)
    names = {variant: methods.find(method_of(variant)).name for variant in variants}
    common = options.options_of_each(shared, list(dict.fromkeys(names.values()))) if shared else {}
    own = {}
    for variant, name in names.items():
        fields_of(variant)  # refused here, before anything is opened
        own[variant] = options.options([pair for pair in variant.split(":")[1:] if pair.partition("=")[0].strip() not in OF_REQUEST], name)
    return {variant: {**common.get(name, {}), **own[variant]} for variant, name in names.items()}


def numbers(text: str, flag: str) -> list[int]:
    """"2,3" or "2-5" as numbers in order. Raises Refused."""
    values: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if not match or match[2] and int(match[2]) < int(match[1]):
            raise Refused(f"{flag} {text:.200}: write numbers, as 2,3,4 or 2-5")
        values.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(values)


def interleaved(cases: Sequence[Case], limit: int | None) -> list[Case]:
    """At most `limit` cases, taken in turn from each size; all of them without a limit. In the order given."""
    if limit is None or limit >= len(cases):
        return list(cases)
    by_size: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        by_size.setdefault(case.size, []).append(index)
    turns = [index for turn in range(len(cases)) for rows in by_size.values() for index in rows[turn : turn + 1]]
    return [cases[index] for index in sorted(turns[:limit])]
