"""The `parameters` text that A1111-like tools put in a picture: written from a request, and read back as far as it goes.

Form: prompt with <lora:name:weight> tags, a line "Negative prompt: ...", and a line of settings (`settings_line`).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from composition import prompt_syntax, untrusted
from composition.record import settings_line
from composition.refusal import Refused, explain
from composition.request import SEEDS, Receipt, Request
from composition.sampler_names import BY_TITLE, DEFAULT, FLOW, TITLES
from composition.version import __version__

HASH_DIGITS = 12  # of the sha256 of what follows a LoRA file's header, as A1111 writes it
MAX_QUOTED = 200  # letters of a value in a remark
_DISTILLED = re.compile(r"flux.{0,8}(?:dev|krea)", re.IGNORECASE)  # models that read guidance as a number, by name
_FLOW = re.compile(r"flux|sd3|stable-diffusion-3", re.IGNORECASE)
_DISTILLED_KEYS = ("distilled cfg scale", "distilled cfg", "flux guidance", "flux guidance scale")
_LORA_KINDS = ("lora", "lycoris", "locon", "dora", "lyco")
_SILENT = {"version", "model hash", "model", "lora hashes", "schedule type", "sampler", "method", "hashes", "civitai resources",
           "civitai metadata", "created date", "cfg scale", "ti hashes", *_DISTILLED_KEYS}


def plain(name: str) -> str:
    """A LoRA's name as a tag may hold it: no slashes (a reader would drop the weight), none of the tag's own signs."""
    return re.sub(r'[\\/:<>,"\n]', "_", name)


def write(
    request: Request, receipts: Sequence[Receipt], size: tuple[int, int], sampler: str = "", *, distilled: bool | None = None,
) -> str:
    """The text of one picture of `size` (width, height); `receipts` in the order of the request's LoRAs.

    sampler: A1111's name of it, where the request's own ("default") does not say it. distilled: whether the model reads guidance as a number
    (then true_guidance is what others call CFG); None: by its name, and by true_guidance, which only such models have.
    """
    if distilled is None:
        distilled = request.true_guidance > 1 or bool(_DISTILLED.search(request.model))
    sampler = sampler or TITLES.get(request.sampler, "")
    title, schedule = ("Euler", "Simple") if sampler == FLOW else (sampler, "")
    guidance = "" if request.guidance is None else f"{request.guidance:g}"
    prompt, _ = prompt_syntax.untagged(request.prompt)  # no tag but those of LoRAs that were used
    tags = "".join(f" {prompt_syntax.written(plain(name), lora)}" for name, lora in zip(request.names, request.loras, strict=True))
    hashes = ", ".join(f"{plain(name)}: {receipt.data_sha256[:HASH_DIGITS]}"
                       for name, receipt in zip(request.names, receipts, strict=True) if receipt.data_sha256)
    pairs = {"Steps": request.steps or "", "Sampler": title, "Schedule type": schedule,
             "CFG scale": f"{request.true_guidance:g}" if distilled else guidance, "Distilled CFG Scale": guidance if distilled else "",
             "Seed": request.seed, "Size": f"{size[0]}x{size[1]}", "Model": plain(re.split(r"[\\/]", request.model.rstrip("\\/"))[-1]),
             "Denoising strength": f"{request.picture.strength:g}" if request.picture else f"{request.hires.strength:g}" if request.hires else "",
             "Hires upscale": f"{request.hires.factor:g}" if request.hires else "",
             "Method": request.method, "Lora hashes": hashes, "Version": f"Medley {__version__}"}
    last = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items() if value != "")
    negative = f"\nNegative prompt: {request.negative}" if request.negative else ""
    return f"{prompt}{tags}{negative}\n{last}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


@dataclass(frozen=True)
class Reading:
    """A request read from such a text; the model's name as that tool knew it; remarks on what could not be kept, LoRAs first.

    hashes: of the LoRAs, by their names in the request, as that tool wrote them.
    """

    request: Request
    model: str
    remarks: tuple[str, ...]
    hashes: Mapping[str, str] = field(default_factory=dict)


def read(text: str) -> Reading:
    """The request in a `parameters` text. Raises Refused when it is not one or its values are out of range."""
    parts = settings_line.split(text)
    pairs = {key.lower(): value for key, value in parts.pairs.items()}
    lost: list[str] = []  # LoRAs
    remarks: list[str] = []
    try:
        prompt, tags = prompt_syntax.untagged(parts.prompt)
        fields: dict[str, Any] = {"prompt": prompt, "negative": parts.negative, "loras": [tag.lora for tag in tags]}
        lost += [f"{argument[:MAX_QUOTED]!r} of LoRA {tag.lora.name} could not be read" for tag in tags for argument in tag.unread]
        for key, name, convert in _FIELDS:
            if key in pairs:
                try:
                    fields[name] = convert(pairs[key])
                except ValueError:
                    remarks.append(f"{key.capitalize()}: {_short(pairs[key])!r} could not be read")
        fields |= _guidance(pairs, remarks) | _sampler(pairs, remarks)
        if "method" in pairs:
            fields["method"] = pairs["method"]
        request = Request(**fields)
    except ValidationError as error:
        raise Refused(f"the picture's parameters text cannot be used: {explain(error)}") from None
    hashes: dict[str, str] = {}
    for name, digits in _hashes(pairs):
        hashes.setdefault(plain(name), digits)
    named = {plain(name): name for name in request.names}
    lost += [f"LoRA {name} (hash {digits}) was used, but the prompt does not say with which weight: give it with --lora"
             for name, digits in hashes.items() if name not in named]
    lost += _resources(pairs, len(request.loras), remarks)
    if pieces := prompt_syntax.unread(request):
        remarks.append(prompt_syntax.sentence(pieces))
    known = _SILENT | {key for key, *_ in _FIELDS}
    remarks += [f"{key}: {_short(value)} is not used" for key, value in parts.pairs.items() if key.lower() not in known]
    remarks += [f"what follows the settings is not used: {_short(line)!r}" for line in parts.after]
    return Reading(request, pairs.get("model", ""), (*lost, *remarks),
                   {named[name]: digits for name, digits in hashes.items() if name in named})


def _short(value: str) -> str:
    return value if len(value) <= MAX_QUOTED else f"{value[:MAX_QUOTED]}..."


def _size(value: str) -> tuple[int, int]:
    width, high = value.split("x")
    return int(width), int(high)


def _seed(value: str) -> int:
    """-1, another tool's word for a random one, is no seed that was used; others of 64 bits write large ones as negative."""
    seed = int(value)
    if not -(SEEDS // 2) <= seed < SEEDS or seed == -1:
        raise ValueError
    return seed % SEEDS


_FIELDS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (("steps", "steps", int), ("seed", "seed", _seed), ("size", "size", _size))


def _guidance(pairs: Mapping[str, str], remarks: list[str]) -> dict[str, float]:
    """CFG is guidance, except beside a distilled one: then it is the true guidance, against the negative prompt."""
    read: dict[str, float] = {}
    values = {"guidance": next((pairs[key] for key in _DISTILLED_KEYS if key in pairs), None), "true_guidance": pairs.get("cfg scale")}
    if values["guidance"] is None:
        values = {"guidance": values["true_guidance"]}
    for name, value in values.items():
        if value is None:
            continue
        try:
            read[name] = float(value)
        except ValueError:
            remarks.append(f"{'Distilled CFG' if name == 'guidance' and len(values) == 2 else 'CFG'} scale: {_short(value)!r} could not be read")
    if read.get("true_guidance", 1.0) < 1.0:
        remarks.append(f"CFG scale {read['true_guidance']:g} beside a distilled guidance is read as 1, which is off")
        read["true_guidance"] = 1.0
    return read


def _sampler(pairs: Mapping[str, str], remarks: list[str]) -> dict[str, str]:
    """The sampler of ours with this title; newer texts write "DPM++ 2M" and "Schedule type: Karras" apart.

    "Euler" with "Simple" is what a model that follows a flow was made for: its own sampler.
    """
    name, schedule = pairs.get("sampler", ""), pairs.get("schedule type", "")
    both = f"{name} {schedule}".strip()
    if both.lower() == FLOW.lower() and (any(key in pairs for key in _DISTILLED_KEYS) or _FLOW.search(pairs.get("model", ""))):
        return {"sampler": DEFAULT}
    for wanted in (both, name if schedule in ("", "Automatic") else ""):
        if wanted.lower() in BY_TITLE:
            return {"sampler": BY_TITLE[wanted.lower()]}
    if schedule and name.lower() in BY_TITLE:
        remarks.append(f"Schedule type {_short(schedule)!r} is not known here; sampler {_short(name)!r} is used with the model's own")
        return {"sampler": BY_TITLE[name.lower()]}
    if name:
        remarks.append(f"Sampler {_short(both)!r} is not known here; the model's own is used")
    return {}


def _hashes(pairs: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Name and hash of each LoRA, from "Lora hashes" (a list in a string) and from "Hashes" (JSON, "lora:name")."""
    for part in pairs.get("lora hashes", "").split(","):
        name, colon, digits = part.rpartition(":")
        if colon and name.strip() and digits.strip():
            yield name.strip(), digits.strip().lower()
    for name, digits in _object(pairs.get("hashes", "")).items():
        kind, colon, name = name.partition(":")
        if colon and kind.lower() in ("lora", "lyco") and isinstance(digits, str) and digits:
            yield name, digits.lower()


def _resources(pairs: Mapping[str, str], tagged: int, remarks: list[str]) -> list[str]:
    """The LoRAs that Civitai's list has and no tag names, in words; embeddings and the like go to the remarks."""
    lost: list[str] = []
    resources = _json(pairs.get("civitai resources", ""))
    for resource in resources if isinstance(resources, list) else ():
        if not isinstance(resource, dict):
            continue
        kind = str(resource.get("type", "")).lower()
        title = " ".join(str(resource[key]) for key in ("modelName", "modelVersionName") if resource.get(key))
        version = resource.get("modelVersionId") or resource.get("air") or ""
        about = f"{_short(title) or '(not named)'}" + (f" (Civitai version {_short(str(version))})" if version else "")
        if kind in _LORA_KINDS:
            lost.append(f"LoRA {about}, weight {_short(str(resource.get('weight', 1)))}, was used and is not named by its file: get it and "
                        "give it with --lora")
        elif kind not in ("checkpoint", "model", "upscaler", ""):
            remarks.append(f"{kind} {about} is not used")
    for name in _object(pairs.get("hashes", "")):
        kind, _, rest = name.partition(":")
        if kind.lower() in ("embed", "hypernet"):
            remarks.append(f"embed {_short(rest)} is read where a prompt says embedding:{_short(rest)}, or with --embedding" if kind.lower() == "embed" else
                           f"{kind.lower()} {_short(rest)} is not used")
    if "ti hashes" in pairs:
        remarks.append(f"TI hashes: {_short(pairs['ti hashes'])} is not used")
    return lost if len(lost) > tagged else []  # the tags are the same LoRAs by other names


def _json(text: str) -> Any:
    try:
        return untrusted.parse(text, odd_letters=True) if text[:1] in ("[", "{") else None
    except untrusted.Unreadable:
        return None


def _object(text: str) -> Mapping[str, Any]:
    value = _json(text)
    return value if isinstance(value, dict) else {}
