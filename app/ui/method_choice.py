"""Which method: what a user wants of it, the methods that do that, one sentence on the chosen one, and its cost.

What a method is for follows from what it declares, so a new one is offered without being named here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.cost import expected, spoken
from composition.methods import Method

RECOMMENDED = ("merge", "clora-fast", "switch", "composite", "np-lora", "autolora")  # stand first in their groups


@dataclass(frozen=True)
class Goal:
    """What one may want. advice: when to take it, as far as the bundled models show (README)."""

    title: str
    advice: str
    holds: Callable[[Method], bool]


GOALS: Mapping[str, Goal] = {
    "add": Goal("Add up", "What other tools do. For two LoRAs of different kinds no other method was told apart from it.", lambda method: method.steady),
    "place": Goal("Own place", "For several characters or things, each itself, with clothes, a place and a style. It needs their trigger words in the prompt, "
                  "or what each belongs to.", lambda method: method.regional),
    "turns": Goal("Take turns", "Few steps (4, 8) leave it few turns to share out.", lambda method: not method.symmetric),
    "fuse": Goal("Fuse", "One LoRA made of all. For a subject in a style take NP-LoRA.", lambda method: method.static),
    "ask": Goal("Ask each", "Every LoRA is asked at every step, which costs an evaluation each.", lambda method: "K" in plain(method.cost)),
    "gate": Goal("Gate", "Decides layer by layer or token by token which LoRA acts.", lambda method: True),
}


def plain(cost: str) -> str:
    """A cost without what is said of other cases in brackets."""
    return re.split(r" \((?!K )", cost)[0]


def goal(method: Method) -> str:
    """The key of the first goal that it serves."""
    return next(key for key, goal in GOALS.items() if goal.holds(method))


def ordered(methods: Mapping[str, Method]) -> list[Method]:
    """All methods, those of one goal together, the recommended ones of each first."""
    keys, first = list(GOALS), list(RECOMMENDED)
    return sorted(methods.values(), key=lambda method: (keys.index(goal(method)), first.index(method.name) if method.name in first else len(first), method.title))


def choices(methods: Mapping[str, Method]) -> list[tuple[str, str]]:
    """(what is shown, name) of each, found by either's words."""
    return [(f"{method.title}  ·  {GOALS[goal(method)].title.lower()}", method.name) for method in ordered(methods)]


def sentence(method: Method, loras: int, steps: int, seconds: Callable[[float], float | None]) -> str:
    """What it does, when to take it, and what a picture with so many LoRAs costs. seconds: of so many evaluations a step; None: not known."""
    each = max(1.0, expected(plain(method.cost), loras))
    about = "about " * plain(method.cost).startswith("about")
    costs = f"{steps} steps of {about}{f'{each:.1f}'.removesuffix('.0')} evaluation{'s' * (each != 1.0)}"
    costs += f": {about}{round(steps * each)}" if each != 1.0 else ""
    time = seconds(each)
    return f"**{method.about}** {GOALS[goal(method)].advice}\n\n{costs}" + (f", about {spoken(time)}." if time is not None else ".")
