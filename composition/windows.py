"""Content early, style late: a part of the steps for every LoRA that has none, by its category (CRAFT-LoRA, arXiv 2602.18936).

What a picture shows is decided in its first steps, how it is drawn in its last ones. The paper has one LoRA of content and one of style; that
clothing, places and poses are content, as characters and objects are, is ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from composition.request import Lora, Request

CONTENT, STYLE = (0.0, 0.7), (0.3, 1.0)  # of the steps
WINDOWS = dict.fromkeys(("character", "object", "clothing", "place", "pose"), CONTENT) | {"style": STYLE}
NOTE = "windows"  # in Result.notes: by name of a LoRA, the part of the steps that its category has, or why it has none
_ONE_STEP, _UNKNOWN = "a single step is neither early nor late", "its category is neither content nor style"


def settled(request: Request, category: Callable[[Lora], str]) -> Request:
    """The request with start and end of its LoRAs by category, where it asks for that: of those that are on, at any weight but 0, in all steps.

    category: of a LoRA, as the request or else its file says. The request's steps are settled. It settles to itself.
    """
    if not request.windows or request.length == 1:
        return request
    return replace(request, loras=[_windowed(lora, category) for lora in request.loras])


def _windowed(lora: Lora, category: Callable[[Lora], str]) -> Lora:
    if lora.scheduled or lora.weight == 0.0:
        return lora
    window = WINDOWS.get(category(lora))
    return replace(lora, start=window[0], end=window[1]) if window else lora


def noted(request: Request, categories: Mapping[str, str]) -> dict[str, Any]:
    """The note on a settled request; none where it does not ask for windows, or all of its LoRAs have a schedule of their own.

    categories: of every LoRA, by name.
    """
    if not request.windows:
        return {}
    note: dict[str, Any] = {}
    for name, lora in request.active.items():
        if lora.scheduled and (lora.start, lora.end) == WINDOWS.get(categories[name]):
            note[name] = [lora.start, lora.end]
        elif not lora.scheduled:
            note[name] = _ONE_STEP if request.length == 1 else _UNKNOWN
    return {NOTE: note} if note else {}
