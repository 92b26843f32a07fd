"""What a user should know of a request: what of it was not read, and where the numbers of its picture overflowed."""

from collections.abc import Sequence
from typing import Any

from composition import methods, named, prompt_syntax, prompts, windows
from composition.adapters import Adapters
from composition.backbones import schedulers
from composition.backbones.base import Backbone
from composition.loop import NotFinite
from composition.refusal import Refused
from composition.request import ALWAYS_ON, DISTILLED_NOTE, SAMPLER_NOTE, Receipt, Request


def opening_notes(request: Request, receipts: Sequence[Receipt], backbone: Backbone) -> dict[str, Any]:
    """The notes that every run begins with: the sampler, trigger words that the prompt lacks, a prompt cut short, settings that
    nothing reads. receipts: one for each LoRA, in order."""
    notes: dict[str, Any] = {"method": request.method, "evaluations": 0, SAMPLER_NOTE: schedulers.title(request.sampler, backbone.scheduler)}
    if (distilled := backbone.embedded_guidance(request)) is not None:
        notes[DISTILLED_NOTE] = distilled
    if pieces := prompt_syntax.unread(request):
        notes[prompt_syntax.UNREAD] = pieces
    if missing := _missing_triggers(request, receipts):
        notes["missing triggers"] = missing
    if cut := backbone.truncated(prompt_syntax.prompts_of(request)[0]):
        notes["prompt cut"] = cut
    if backbone.scale(request) <= 1.0:
        why = "guidance is off" if distilled is None else "guidance was distilled into this model: set true_guidance over 1"
        notes |= {"negative prompt not read": why} if request.negative else {}
        notes |= {"not anchored": why} if request.anchored else {}
    notes |= named.noted(request, {name: lora.triggers or receipt.triggers
                                   for name, lora, receipt in zip(request.names, request.loras, receipts, strict=True)})
    notes |= windows.noted(request, {name: lora.category or receipt.category
                                     for name, lora, receipt in zip(request.names, request.loras, receipts, strict=True)})
    regional = methods.find(request.method).regional
    placed = [name for name, lora in request.active.items()
              if (lora.binds is not None or lora.region is not None) and not (regional and lora.category != ALWAYS_ON)]
    notes |= {"not read by this method": {name: "binds and region" for name in placed}} if placed else {}
    return notes


def unranked(request: Request, method: methods.Method, adapters: Adapters) -> dict[str, Any]:
    """What a method of ranks does with LoRAs of kinds that have none. Raises Refused where it takes none of those beside others."""
    names = [name for name in adapters.unranked() if name in request.active]
    if not names or not method.ranks or len(request.active) < 2:
        return {}
    if method.ranks == "all":
        raise Refused(f"method {method.name} works on the ranks of LoRAs, and {', '.join(names)} changes layers without ranks (as LoKr, DoRA or a full "
                      "difference does): choose another method, as merge or composite")
    return {"without ranks": {name: "added at its weight alone in layers where it has no ranks" for name in names}}


def _missing_triggers(request: Request, receipts: Sequence[Receipt]) -> dict[str, list[str]]:
    """Of every LoRA that is on in some step: its trigger words, where the prompt has none of them."""
    triggers = {name: lora.triggers or receipt.triggers
                for name, lora, receipt in zip(request.names, request.loras, receipts, strict=True) if name in request.active}
    return {name: list(words) for name, words in triggers.items() if prompts.lacks(prompt_syntax.words(request), words)}


def overflow(error: NotFinite, request: Request, adapters: Adapters, backbone: Backbone) -> str:
    """Where the numbers of a picture overflowed, whose update is the largest, and what to do. Within the request's session."""
    where = f"at step {error.step} of {error.count}" if error.step else "while the picture was decoded"
    sizes = {name: (abs(request.weights[name]) * size, layer) for name, (size, layer) in adapters.sizes().items() if name in request.active}
    if not sizes:
        return (f"the numbers overflowed {where}, so there is no picture: no LoRA is on, so choose another dtype "
                f"(float32 or bfloat16, not {str(backbone.dtype).removeprefix('torch.')}) or less guidance")
    name, (size, layer) = max(sizes.items(), key=lambda item: item[1][0])
    return (f"the numbers overflowed {where}, so there is no picture: LoRA {name} has the largest update, about {size:.2g} times "
            f"the weights of {layer}; lower its weight, leave it out, or compute in float32")
