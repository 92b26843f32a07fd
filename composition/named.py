"""Only the LoRAs that the prompt names: one whose trigger words it does not say is taken out, whichever method adds the others up."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from composition import prompt_syntax, prompts
from composition.request import Lora, Request

NOTE = "not named"  # in Result.notes: the LoRAs that were taken out


def settled(request: Request, triggers: Callable[[Lora], Sequence[str]]) -> Request:
    """The request with weight 0 for every LoRA that has trigger words of which the prompt says none, where it asks for that.

    triggers: of a LoRA, as the request or else its file says. One bound to words of the prompt, or to a region, is named by that; one
    without trigger words cannot be named, and stays. It settles to itself.
    """
    if not request.named_only:
        return request
    return replace(request, loras=[replace(lora, weight=0.0) if _unnamed(lora, prompt_syntax.words(request), triggers(lora)) else lora for lora in request.loras])


def noted(request: Request, triggers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The note on a settled request. triggers: of every LoRA, by name."""
    out = [name for name, lora in zip(request.names, request.loras, strict=True)
           if request.named_only and lora.weight == 0.0 and _unnamed(lora, prompt_syntax.words(request), triggers[name])]
    return {NOTE: out} if out else {}


def _unnamed(lora: Lora, prompt: str, triggers: Sequence[str]) -> bool:
    return lora.binds is None and lora.region is None and prompts.lacks(prompt, triggers)
