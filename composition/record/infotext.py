"""The `parameters` text that A1111-like tools put in a PNG: written from a request, and read back as far as it goes.

Form: prompt with <lora:name:weight> tags, a line "Negative prompt: ...", and a last line of at least three "key: value"
pairs; a value with a comma, colon or newline is a JSON string.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from composition.request import Lora, Receipt, Refused, Request, explain
from composition.version import __version__

_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_TAG = re.compile(r"\s*<lora:([^:>]+)(?::([^>]*))?>")
_SYNTAX = re.compile(r"\([^()]*:[\d.]+\)|\bBREAK\b|\[[^\[\]]*:[^\[\]]*\]|<(?:hypernet|lyco):")
_SILENT = {"Version", "Model hash", "Model", "Lora hashes", "Schedule type", "Method"}


def plain(name: str) -> str:
    """A LoRA's name as a tag may hold it: no slashes (a reader would drop the weight), none of the tag's own signs."""
    return re.sub(r'[\\/:<>,"\n]', "_", name)


def write(request: Request, receipts: Sequence[Receipt], size: tuple[int, int], sampler: str = "") -> str:
    """The text of one picture of `size` (width, height); `receipts` in the order of the request's LoRAs.

    sampler: A1111's name of it, where the request's own ("default") does not tell.
    """
    from composition.backbones import schedulers

    sampler = sampler or schedulers.named(request.sampler).title
    tags = "".join(f" <lora:{plain(name)}:{_weights(lora)}>" for name, lora in zip(request.names, request.loras, strict=True))
    hashes = ", ".join(f"{plain(name)}: {receipt.sha256[:12]}" for name, receipt in zip(request.names, receipts, strict=True))
    pairs = {"Steps": request.steps or "", "Sampler": sampler, "CFG scale": "" if request.guidance is None else f"{request.guidance:g}",
             "Seed": request.seed, "Size": f"{size[0]}x{size[1]}", "Model": plain(re.split(r"[\\/]", request.model)[-1]),
             "Method": request.method, "Lora hashes": hashes, "Version": f"Medley {__version__}"}
    last = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items() if value != "")
    negative = f"\nNegative prompt: {request.negative}" if request.negative else ""
    return f"{request.prompt}{tags}{negative}\n{last}"


def _weights(lora: Lora) -> str:
    """"0.8", or "0.5:0.8" when the text encoder's differs: A1111 puts the text encoder first."""
    text = lora.weight if lora.text_weight is None else lora.text_weight
    return f"{lora.weight:g}" if text == lora.weight else f"{text:g}:{lora.weight:g}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


@dataclass(frozen=True)
class Reading:
    """A request read from such a text; the model's name as that tool knew it; remarks on what could not be kept."""

    request: Request
    model: str
    remarks: tuple[str, ...]


def read(text: str) -> Reading:
    """The request in a `parameters` text. Raises Refused when it is not one or its values are out of range."""
    body, pairs = _split(text)
    if not pairs:
        raise Refused("the picture's parameters text has no settings line (Steps, Sampler, CFG scale, ...)")
    prompt, _, negative = body.partition("\nNegative prompt:")
    if body.startswith("Negative prompt:"):
        prompt, negative = "", body.removeprefix("Negative prompt:")
    remarks: list[str] = []
    fields: dict[str, Any] = {"prompt": _TAG.sub("", prompt).strip(), "negative": negative.strip()}
    for key, name, convert in _FIELDS:
        if key in pairs:
            try:
                fields[name] = convert(pairs[key])
            except ValueError:
                remarks.append(f"{key}: {pairs[key]!r} could not be read")
    fields |= _sampler(pairs, remarks)
    if "Method" in pairs:
        fields["method"] = pairs["Method"]
    if _SYNTAX.search(prompt + negative):
        remarks.append("prompt weights and schedules such as (word:1.2), [a:b:0.5] or BREAK are read as plain words")
    known = _SILENT | {"Sampler"} | {key for key, *_ in _FIELDS}
    remarks += [f"{key}: {value} is not used" for key, value in pairs.items() if key not in known]
    try:
        fields["loras"] = [_lora(match[1], match[2] or "", remarks) for match in _TAG.finditer(prompt)]
        return Reading(Request(**fields), pairs.get("Model", ""), tuple(remarks))
    except ValidationError as error:
        raise Refused(f"the picture's parameters text cannot be used: {explain(error)}") from None


def _split(text: str) -> tuple[str, dict[str, str]]:
    """The prompts, and the pairs of the last line when it has at least three."""
    *lines, last = text.strip().split("\n")
    pairs = {key.strip(): _unquoted(value) for key, value in _PAIR.findall(last)}
    return ("\n".join(lines), pairs) if len(pairs) >= 3 else (text, {})


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip()


def _size(value: str) -> tuple[int, int]:
    width, high = value.split("x")
    return int(width), int(high)


_FIELDS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("Steps", "steps", int), ("CFG scale", "guidance", float), ("Seed", "seed", int), ("Size", "size", _size))


def _lora(name: str, arguments: str, remarks: list[str]) -> Lora:
    """<lora:name:w>, <lora:name:text:denoiser> or with te= and unet= by name; the denoiser's is the text's, if not given."""
    text, denoiser = 1.0, None
    for position, argument in enumerate(arguments.split(":") if arguments else []):
        key, _, value = argument.rpartition("=")
        try:
            if key == "te" or (not key and position == 0):
                text = float(value)
            elif key == "unet" or (not key and position == 1):
                denoiser = float(value)
            else:
                remarks.append(f"{argument!r} of LoRA {name} is not used")
        except ValueError:
            remarks.append(f"weight {argument!r} of LoRA {name} could not be read")
    weight = text if denoiser is None else denoiser
    return Lora(name, weight=weight, text_weight=None if text == weight else text)


def _sampler(pairs: Mapping[str, str], remarks: list[str]) -> dict[str, str]:
    """The sampler of ours with this title; newer texts write "DPM++ 2M" and "Schedule type: Karras" apart."""
    from composition.backbones import schedulers

    given, schedule = pairs.get("Sampler", ""), pairs.get("Schedule type", "")
    titles = {entry.title.lower(): name for name, entry in schedulers.NAMES.items() if entry.title}
    for wanted in (f"{given} {schedule}", given if schedule in ("", "Automatic") else ""):
        if wanted.strip().lower() in titles:
            return {"sampler": titles[wanted.strip().lower()]}
    if given:
        remarks.append(f"Sampler {given!r} {schedule} is not known here; the model's own is used".replace("  ", " "))
    return {}
