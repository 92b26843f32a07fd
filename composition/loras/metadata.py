"""What the header of a LoRA file says beside its tensors: title, category, trigger words, alphas.

All of it was typed by somebody: it is shown and searched, never executed, and no key or shape is believed from it.
Alphas are read from it only as diffusers writes them ("lora_adapter_metadata"), for modules without an alpha tensor.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from composition.request import Category, Refused

ADAPTER = "lora_adapter_metadata"
MAX_TRIGGERS = 64
MAX_LETTERS = 200


def title(metadata: Mapping[str, str]) -> str:
    return _line(metadata.get("title") or metadata.get("modelspec.title") or "")


def category(metadata: Mapping[str, str]) -> str:
    """One of `Category`, or "" for anything else."""
    found = metadata.get("category", "").strip().lower()
    return found if found in get_args(Category) else ""


def triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger words, in order, each once: "trigger_words" split at commas, else "modelspec.trigger_phrase"."""
    text = metadata.get("trigger_words") or metadata.get("modelspec.trigger_phrase") or ""
    words = (_line(word) for word in text.split(","))
    return tuple(dict.fromkeys(word for word in words if word))[:MAX_TRIGGERS]


def _line(text: str) -> str:
    return " ".join(text.split())[:MAX_LETTERS]


def adapter(metadata: Mapping[str, str], file: str) -> dict[str, Any]:
    """The adapter settings diffusers wrote ({} without). Raises Refused when they are there but cannot be read."""
    if ADAPTER not in metadata:
        return {}
    try:
        found = json.loads(metadata[ADAPTER])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(f"{file}: its {ADAPTER} is not a JSON object, so its alphas are unknown")
    return found


def alpha(settings: Mapping[str, Any], component: str, module: str, rank: int, file: str) -> float:
    """alpha of one module by the adapter settings, such that alpha / rank is its factor; rank when they say nothing.

    Keys carry the component ("unet.lora_alpha"), or nothing in files of one model. With rank-stabilised scaling
    (use_rslora: alpha / sqrt(rank)) the answer is alpha * sqrt(rank). Raises Refused for what is no number.
    """
    prefix = f"{component}." if any(key.startswith(f"{component}.") for key in settings) else ""
    found = settings.get(f"{prefix}lora_alpha")
    patterns = settings.get(f"{prefix}alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise Refused(f"{file}: alpha_pattern in its {ADAPTER} is not a JSON object")
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not all(letter.isalnum() or letter in "._-" for letter in name):
            raise Refused(f"{file}: alpha_pattern {pattern[:80]!r} in its {ADAPTER} is more than the name of a layer")
        if f".{module}".endswith(f".{name}"):
            found = value
            break
    if found is None:
        return float(rank)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise Refused(f"{file}: alpha {str(found)[:80]!r} in its {ADAPTER} is not a number")
    return float(found) * (math.sqrt(rank) if settings.get(f"{prefix}use_rslora") is True else 1.0)
