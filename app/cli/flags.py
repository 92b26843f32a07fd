"""The words of the command line, read into a Request."""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.options import options as method_options
from app.options import size as read_size
from composition import Lora, Refused, Request
from composition.prompts import with_triggers as with_triggers
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


def request(given: Mapping[str, Any], start: Request | None = None) -> tuple[Request, bool]:
    """The request of these flags (None or empty: not given), over `start` if there is one; and whether its seed was drawn.

    Raises Refused, or pydantic's ValidationError for a value out of range.
    """
    fields = {key: value for key, value in given.items() if value is not None and value != [] and key in _PLAIN}
    if given.get("lora"):
        fields["loras"] = tuple(lora(text) for text in given["lora"])
    if given.get("size"):
        fields["size"] = read_size(given["size"])
    before = start or Request(prompt="")
    method = fields.get("method", before.method)
    kept = dict(before.options) if method == before.method else {}
    fields["options"] = kept | method_options(given.get("option") or [], method)
    drawn = "seed" not in fields and start is None
    if drawn:
        fields["seed"] = secrets.randbelow(2**32)
    if start is None and not str(fields.get("prompt", "")).strip():
        raise Refused('a prompt is needed: medley generate "a raccoon in the snow" --lora raccoon')
    from composition.backbones import schedulers

    made = replace(before, **fields)
    schedulers.named(made.sampler)  # Refused, with the nearest names, before a model is opened
    return made, drawn


_PLAIN = {"prompt", "negative", "model", "method", "sampler", "steps", "guidance", "true_guidance", "seed", "count", "batched", "allow_partial"}
