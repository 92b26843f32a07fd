"""The composition methods: one file each, discovered. Adding a method is adding a file."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from composition.loop import Predict
from composition.refusal import Refused, explain
from composition.run import Run

Compose = Callable[[Run, Any], AbstractContextManager[Predict]]


@dataclass(frozen=True)
class Method:
    """What is known of a method.

    compose: set up, yield the step function, clean up. options: a frozen dataclass; each field's metadata has "help" and
    may have "ge" and "le". cost: evaluations a step, in words. symmetric: the order of the LoRAs does not matter.
    single: with one LoRA it equals Merge. steady: every step uses all live LoRAs at their weights in every row, so the
    Engine may fold them into the weights. regional: it reads what a LoRA binds to and its region. static: the LoRAs amount to one, whose
    factors are the same in every step, row and place, so that it can be written as a file (`composition.export`). ranks: it works on the
    ranks of LoRAs; what has none ("some") it adds at its weight alone, or ("all") it does not take beside others.
    """

    name: str
    title: str
    about: str
    compose: Compose
    options: type
    paper: str = ""
    cost: str = "1"
    symmetric: bool = True
    single: bool = True
    steady: bool = False
    regional: bool = False
    static: bool = False
    ranks: Literal["", "some", "all"] = ""

    def read(self, values: Mapping[str, Any]) -> Any:
        """The options dataclass from plain values. Raises Refused for an unknown name, a wrong type or range."""
        known = {item.name: item for item in fields(self.options)}
        for name in values:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise Refused(f"method {self.name!r} has no option {name!r}; it has "
                              f"{', '.join(sorted(known)) or 'none'}{hint}")
        hints, read = get_type_hints(self.options), {}
        for name, value in values.items():
            try:
                read[name] = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                raise Refused(f"option {name} of method {self.name!r}: {explain(error)}") from None
            bounds = known[name].metadata
            if read[name] is None:
                continue
            if "ge" in bounds and read[name] < bounds["ge"] or "le" in bounds and read[name] > bounds["le"]:
                raise Refused(f"option {name} of method {self.name!r} is {read[name]}; it must lie between "
                              f"{bounds.get('ge', '-inf')} and {bounds.get('le', 'inf')}")
        return self.options(**read)


def method(
    *, title: str, about: str, paper: str = "", cost: str = "1", symmetric: bool = True, single: bool = True,
    steady: bool = False, regional: bool = False, static: bool = False, ranks: Literal["", "some", "all"] = "",
) -> Callable[[Compose], Method]:
    """Declare the generator function below as a composition method; its file's name is its name."""

    def declare(compose: Compose) -> Method:
        options = get_type_hints(compose)["options"]
        name = compose.__module__.rpartition(".")[2].replace("_", "-")
        return Method(name, title, about, compose, options, paper, cost, symmetric, single, steady, regional, static, ranks)

    return declare


@cache
def all() -> Mapping[str, Method]:
    """Every method by name, in the order of their names."""
    methods = {}
    for module in pkgutil.iter_modules(__path__):
        if module.ispkg:
            continue
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Method):
                methods[value.name] = value
    return dict(sorted(methods.items()))


def find(name: str) -> Method:
    """The method of this name. Raises Refused with the nearest name."""
    known = all()
    if name not in known:
        near = get_close_matches(name.lower(), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise Refused(f"no method is named {name!r}; there are {', '.join(known)}{hint}")
    return known[name]
