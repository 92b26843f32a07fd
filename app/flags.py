"""The words of the command line, read into a Request."""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from composition import Lora, Receipt, Refused, Request
from composition.request import explain

_ALIASES = {"lora_id": "source", "lora_scale": "weight"}  # as diffusers-cli writes them
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def lora(text: str) -> Lora:
    """NAME, NAME:WEIGHT, a path (C:\\loras\\owl.safetensors:0.8 too), or the fields of a Lora as JSON."""
    try:
        return _lora(text)
    except ValidationError as error:
        raise Refused(f"--lora {text}: {explain(error)}") from None


def _lora(text: str) -> Lora:
    if text.lstrip().startswith("{"):
        return _lora_json(text)
    name, colon, weight = text.rpartition(":")
    if colon and name and _NUMBER.fullmatch(weight.strip()):
        return Lora(name.strip(), weight=float(weight))
    if colon and not re.search(r"[\\/]", weight) and not Path(text).exists():
        raise Refused(f"--lora {text}: {weight!r} is not a number; write NAME or NAME:WEIGHT, as in owl:0.8")
    if not text.strip():
        raise Refused("--lora is empty; write NAME or NAME:WEIGHT, as in owl:0.8")
    return Lora(text.strip())


def _lora_json(text: str) -> Lora:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise Refused(f"--lora {text}: not JSON ({error})") from None
    fields = {_ALIASES.get(str(key), str(key)): value for key, value in fields.items()}
    if "source" not in fields:
        raise Refused(f'--lora {text}: "source" is missing, as in {{"source": "owl", "weight": 0.8}}')
    return Lora(**fields)


def size(text: str) -> tuple[int, int]:
    """WxH or one number for a square."""
    found = re.fullmatch(r"\s*(\d+)\s*(?:[xX×*]\s*(\d+))?\s*", text)
    if not found:
        raise Refused(f"--size {text}: write WIDTHxHEIGHT in pixels, as in 512x768")
    return int(found[1]), int(found[2] or found[1])


def options(pairs: Sequence[str], method: str) -> dict[str, Any]:
    """key=value pairs, each with the type that the method's options give it. Raises Refused as the method does."""
    from composition import methods

    found, read = methods.find(method), {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise Refused(f"--option {pair}: write key=value; {_known(found)}")
        read[key] = _typed(found, key, value)
    return read


def options_of_each(pairs: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Method to its options: every pair goes to those of the methods that have it. Raises Refused when none has."""
    read: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for pair in pairs:
        refusals, taken = [], False
        for name in methods:
            try:
                read[name] |= options([pair], name)
                taken = True
            except Refused as error:
                refusals.append(error)
        if not taken:
            raise refusals[-1]
    return read


def _typed(method: Any, key: str, value: str) -> Any:
    """The word as the option's type; a list or the like as JSON."""
    try:
        return getattr(method.read({key: value}), key)
    except Refused as refused:
        try:
            loaded = json.loads(value)
        except ValueError:
            raise refused from None
        return getattr(method.read({key: loaded}), key)


def _known(method: Any) -> str:
    from dataclasses import fields

    names = ", ".join(item.name for item in fields(method.options))
    return f"method {method.name!r} has {names or 'no options'}"


def request(given: Mapping[str, Any], start: Request | None = None) -> tuple[Request, bool]:
    """The request of these flags (None or empty: not given), over `start` if there is one; and whether its seed was drawn.

    Raises Refused, or pydantic's ValidationError for a value out of range.
    """
    fields = {key: value for key, value in given.items() if value is not None and value != [] and key in _PLAIN}
    if given.get("lora"):
        fields["loras"] = tuple(lora(text) for text in given["lora"])
    if given.get("size"):
        fields["size"] = size(given["size"])
    before = start or Request(prompt="")
    method = fields.get("method", before.method)
    kept = dict(before.options) if method == before.method else {}
    fields["options"] = kept | options(given.get("option") or [], method)
    drawn = "seed" not in fields and start is None
    if drawn:
        fields["seed"] = secrets.randbelow(2**32)
    if start is None and not str(fields.get("prompt", "")).strip():
        raise Refused('a prompt is needed: medley generate "a raccoon in the snow" --lora raccoon')
    from composition.backbones import samplers

    made = replace(before, **fields)
    samplers.named(made.sampler)  # Refused, with the nearest names, before a model is opened
    return made, drawn


_PLAIN = {"prompt", "negative", "model", "method", "sampler", "steps", "guidance", "true_guidance", "seed", "count", "batched", "allow_partial"}


def with_triggers(request: Request, inspect: Callable[[str], Receipt]) -> tuple[Request, list[str]]:
    """The request with the first trigger word of every LoRA that has none in the prompt, and the words put in."""
    added: list[str] = []
    for one in request.loras:
        words = one.triggers or inspect(one.source).triggers
        text = " ".join([request.prompt, *added]).lower()
        if words and not any(word.lower() in text for word in words):
            added.append(words[0])
    return replace(request, prompt=", ".join([request.prompt, *added]) if request.prompt else ", ".join(added)), added
