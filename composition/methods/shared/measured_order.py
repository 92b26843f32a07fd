"""The measured order of a request's LoRAs, written into its options `order` and `low`, so that its record makes it again anywhere."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from composition.methods.shared.dominance import CATEGORY
from composition.profiles.frequency import Profile, ordered
from composition.refusal import Refused
from composition.request import Request

MEASURES, DEFAULT_MEASURE = ("change", "level"), "change"


def pinned(request: Request, options: Collection[str], profiles: Mapping[str, Profile | None]) -> tuple[Request, str]:
    """The request with the measured order of its LoRAs (not of those of weight 0), and what was done or is missing, as a sentence.

    The sentence is "" when neither. options: the names of the method's options; nothing is done for a method without `order` and
    `low`. profiles: by the name of each LoRA, None where it was never measured on this model. Option order: "change" or "level"
    asks for the measured order, by that number; "" takes it where every LoRA was profiled, else the order by category, which is
    pinned then. Raises Refused when it is asked for and a LoRA was not profiled.
    """
    order = request.options.get("order", "")
    if not concerns(request, options):
        return request, ""
    active = request.composed
    if len(active) < 2:
        return replace(request, options={key: value for key, value in request.options.items() if key != "order"}), ""
    measured = {name: profile for name in active if (profile := profiles.get(name)) is not None}
    missing = [lora.source for name, lora in active.items() if name not in measured]
    if missing:
        model = "" if request.model == Request("").model else f" --model {request.model}"
        verb = "is" if len(missing) == 1 else "are"
        why = f"{', '.join(missing)} {verb} not profiled on this model (medley profile {' '.join(missing)}{model})"
        if order:
            raise Refused(f"option order={order}: {why}")
        return replace(request, options={**request.options, "order": CATEGORY}), f"order by category: {why}"
    by = order or DEFAULT_MEASURE
    names, low = ordered(measured, by)
    pins = {"order": ",".join(names), "low": ",".join(low) or "none"}
    sentence = f"order by measured {by} of frequency: {', '.join(names)}; low: {', '.join(low) or 'none'}"
    return replace(request, options={**request.options, **pins}), sentence


def concerns(request: Request, options: Collection[str]) -> bool:
    """Whether the method orders by frequency and the request leaves the order to what was measured (not so order "category")."""
    order = request.options.get("order", "")
    return {"order", "low"} <= set(options) and order in ("", *MEASURES) and not request.options.get("low")
