"""Content early, style late: a part of the steps for every LoRA that has none, by its category (CRAFT-LoRA, arXiv 2602.18936).

What a picture shows is decided in its first steps, how it is drawn in its last ones. The paper has one LoRA of content and one of style ("both"); that
clothing, places and poses are content, as characters and objects are, is ours, and so is "style", where content stays on to the end: on Pocket characters
that go before the end are lost again, and a style that comes late costs nothing (docs/results.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from composition.request import ALWAYS_ON, Lora, Request

CONTENT, STYLE = (0.0, 0.7), (0.3, 1.0)  # of the steps
WINDOWS = {"both": dict.fromkeys(("character", "object", "clothing", "place", "pose"), CONTENT) | {"style": STYLE},
           "style": dict.fromkeys(("character", "object", "clothing", "place", "pose"), (0.0, 1.0)) | {"style": STYLE}}
NOTE = "windows"  # in Result.notes: by name of a LoRA, the part of the steps that its category has, or why it has none
_ONE_STEP, _UNKNOWN = "a single step is neither early nor late", "its category is neither content nor style"


def settled(request: Request, category: Callable[[Lora], str]) -> Request:
    """The request with start and end of its LoRAs by category, where it asks for that: of those that are on, at any weight but 0, in all steps.

    category: of a LoRA, as the request or else its file says. The request's steps are settled. It settles to itself.
    """
    if not request.windows or request.length == 1:
        return request
    return replace(request, loras=[_windowed(lora, WINDOWS[request.windows].get(category(lora))) for lora in request.loras])


def _windowed(lora: Lora, window: tuple[float, float] | None) -> Lora:
    if lora.scheduled or lora.weight == 0.0:
        return lora
    return replace(lora, start=window[0], end=window[1]) if window else lora


def noted(request: Request, categories: Mapping[str, str]) -> dict[str, Any]:
    """The note on a settled request; none where it does not ask for windows, or all of its LoRAs have a schedule of their own.

    categories: of every LoRA, by name.
    """
    if not request.windows:
        return {}
    note: dict[str, Any] = {}
    for name, lora in request.active.items():
        if categories[name] == ALWAYS_ON:
            continue
        window = WINDOWS[request.windows].get(categories[name])
        if lora.scheduled and (lora.start, lora.end) == window:
            note[name] = [lora.start, lora.end]
        elif not lora.scheduled and (window != (0.0, 1.0) or request.length == 1):
            note[name] = _ONE_STEP if request.length == 1 else _UNKNOWN
    return {NOTE: note} if note else {}
