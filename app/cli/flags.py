"""The flags of the command line, read into a Request."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.options import options as method_options
from app.options import size as read_size
from composition import Condition, Embedding, Hires, Lora, Picture, Refused, Request, prompt_syntax, untrusted
from composition.prompts import with_triggers as with_triggers
from composition.refusal import explain

_ALIASES = {"lora_id": "source", "lora_scale": "weight"}  # as diffusers-cli writes them
RANDOM = -1  # the seed by which other tools ask for a random one
_NUMBER = re.compile(r"[+-]?(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def lora(text: str) -> Lora:
    """NAME, NAME:WEIGHT, a path (C:\\loras\\owl.safetensors:0.8 too), or the fields of a Lora as JSON."""
    try:
        return _lora(text)
    except ValidationError as error:
        raise Refused(f"--lora {text:.200}: {explain(error)}") from None


def _lora(text: str) -> Lora:
    if text.lstrip().startswith("{"):
        return _lora_json(text)
    name, colon, weight = text.rpartition(":")
    if colon and name and _NUMBER.fullmatch(weight.strip()):
        return Lora(name.strip(), weight=float(weight))
    if colon and not re.search(r"[\\/]", weight) and not Path(text).exists():
        raise Refused(f"--lora {text:.200}: {weight!r} is not a number; write NAME or NAME:WEIGHT, as in owl:0.8")
    if not text.strip():
        raise Refused("--lora is empty; write NAME or NAME:WEIGHT, as in owl:0.8")
    return Lora(text.strip())


def _lora_json(text: str) -> Lora:
    try:
        fields = untrusted.parse(text)
    except untrusted.Unreadable as error:
        raise Refused(f"--lora {text:.200}: it {error}") from None
    fields = {_ALIASES.get(str(key), str(key)): value for key, value in fields.items()}
    if "source" not in fields:
        raise Refused(f'--lora {text:.200}: "source" is missing, as in {{"source": "owl", "weight": 0.8}}')
    return Lora(**fields)


def embedding(text: str) -> Embedding:
    """FILE, FILE:WORD (C:\\words\\cat.safetensors:cat too), or the fields of an Embedding as JSON."""
    try:
        if text.lstrip().startswith("{"):
            return Embedding(**untrusted.parse(text))
        if text.strip() and Path(text).exists():
            return Embedding(text.strip())
        source, colon, word = text.rpartition(":")
        if not colon or re.search(r"[\\/]", word):
            return Embedding(text.strip())
        if source.strip() and word.strip():
            return Embedding(source.strip(), word.strip())
    except (ValidationError, TypeError) as error:
        raise Refused(f"--embedding {text:.200}: {explain(error) if isinstance(error, ValidationError) else 'source is missing'}") from None
    except untrusted.Unreadable as error:
        raise Refused(f"--embedding {text:.200}: it {error}") from None
    raise Refused(f"--embedding {text:.200}: write FILE or FILE:WORD, as in cat.safetensors:sks")


def control(text: str) -> Condition:
    """NAME=PICTURE, NAME=PICTURE:STRENGTH, either of them a path (canny=C:\\photos\\me.png:0.8 too), or the fields of a Condition as JSON.

    Among those of JSON "mask" may stand, a picture white where the other is to have a hole.
    """
    try:
        return _control_json(text) if text.lstrip().startswith("{") else _control(text)
    except ValidationError as error:
        raise Refused(f"--control {text:.200}: {explain(error)}") from None


def _control(text: str) -> Condition:
    name, equals, rest = text.partition("=")
    if not equals or not name.strip() or not rest.strip():
        raise Refused(f"--control {text:.200}: write NAME=PICTURE or NAME=PICTURE:STRENGTH, as in canny=photo.png:0.8")
    image, colon, strength = rest.strip().rpartition(":")
    if not colon or Path(rest.strip()).exists():
        return Condition(name.strip(), rest.strip())
    if image and _NUMBER.fullmatch(strength.strip()):
        return Condition(name.strip(), image.strip(), strength=float(strength))
    if not re.search(r"[\\/]", strength):
        raise Refused(f"--control {text:.200}: {strength!r} is not a number; write NAME=PICTURE or NAME=PICTURE:STRENGTH, as in canny=photo.png:0.8")
    return Condition(name.strip(), rest.strip())


def _control_json(text: str) -> Condition:
    try:
        fields = untrusted.parse(text)
    except untrusted.Unreadable as error:
        raise Refused(f"--control {text:.200}: it {error}") from None
    fields = {_ALIASES.get(str(key), str(key)): value for key, value in fields.items()}
    if missing := [name for name in ("source", "image") if name not in fields]:
        raise Refused(f'--control {text:.200}: "{missing[0]}" is missing, as in {{"source": "canny", "image": "photo.png", "strength": 0.8}}')
    mask = fields.pop("mask", None)
    condition = Condition(**fields)
    if mask is None:
        return condition
    if not isinstance(mask, str):
        raise Refused(f"--control {text:.200}: mask: must be the path of a black and white picture, white where the hole is")
    return replace(condition, image=with_hole(condition.image, mask, condition.name))


def with_hole(image: str, mask: str, name: str) -> str:
    """The picture of a condition, transparent where the mask is white, as text. Raises Refused for what cannot be read."""
    from composition import pictures

    hole = pictures.opaque(pictures.condition(mask, f"{name} (its mask)"))
    file = pictures.origin(image)
    return pictures.as_text(pictures.with_hole(pictures.condition(image, name), hole), file)


def hires(text: str) -> Hires | None:
    """FACTOR, FACTOR:STRENGTH, the fields of a Hires as JSON, or "none"."""
    try:
        if text.lstrip().startswith("{"):
            return Hires(**untrusted.parse(text))
        parts = text.split(":")
        if text.strip() == "none":
            return None
        if len(parts) > 2 or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
            raise Refused(f"--hires {text:.200}: write FACTOR or FACTOR:STRENGTH, as in 1.5:0.4")
        return Hires(**dict(zip(("factor", "strength"), map(float, parts), strict=False)))
    except ValidationError as error:
        raise Refused(f"--hires {text:.200}: {explain(error)}") from None
    except untrusted.Unreadable as error:
        raise Refused(f"--hires {text:.200}: it {error}") from None
    except TypeError:
        raise Refused(f'--hires {text:.200}: write the fields of a Hires, as in {{"factor": 2, "strength": 0.4, "steps": 20, "space": "pixel"}}') from None


def picture(values: Mapping[str, Any], before: Picture | None) -> Picture | None:
    """What --picture, --strength, --mask, --soft and --fit say, on top of `before`; --picture none: noise, as without any."""
    fields = {key: values[key] for key in _PICTURE if values.get(key) is not None}
    image = values.get("start_from")
    if image == "none" and not fields:
        return None
    if image is None and before is None:
        if fields:
            raise Refused(f"--{next(iter(fields))} says how a picture to start from is used: give it too, as in --picture photo.png --strength 0.6")
        return None
    try:
        return Picture(image, **fields) if image is not None else replace(before, **fields) if before else None
    except ValidationError as error:
        raise Refused(f"--picture: {explain(error)}") from None


def request(values: Mapping[str, Any], start: Request | None = None) -> tuple[Request, bool]:
    """The request of these flags (None or empty: not set) on top of `start`, if there is one; and whether its seed was drawn.

    The seed is drawn for -1, and where neither a flag nor `start` has one.
    Raises Refused, or pydantic's ValidationError for a value out of range.
    """
    fields = {key: value for key, value in values.items() if value is not None and value != [] and key in _PLAIN}
    if values.get("lora"):
        fields["loras"] = tuple(lora(text) for text in values["lora"])
    if values.get("embedding"):
        fields["embeddings"] = tuple(embedding(text) for text in values["embedding"])
    if values.get("control"):
        fields["conditions"] = tuple(control(text) for text in values["control"])
    if values.get("hires"):
        fields["hires"] = hires(values["hires"])
    if values.get("size"):
        fields["size"] = read_size(values["size"])
    if fields.get("windows") == "none":
        fields["windows"] = ""
    before = start or Request(prompt="")
    if "prompt" in fields or "negative" in fields:
        before = prompt_syntax.today(before)
    fields["picture"] = picture(values, before.picture)
    method = fields.get("method", before.method)
    kept = dict(before.options) if method == before.method else {}
    fields["options"] = kept | method_options(values.get("option") or [], method)
    drawn = fields.get("seed") == RANDOM or ("seed" not in fields and start is None)
    if drawn:
        fields["seed"] = secrets.randbelow(2**32)
    if start is None and not str(fields.get("prompt", "")).strip():
        raise Refused('a prompt is needed: medley generate "a raccoon in the snow" --lora raccoon')
    from composition.backbones import schedulers

    merged = replace(before, **fields)
    schedulers.named(merged.sampler)  # Refused, with the nearest names, before a model is opened
    return merged, drawn


_PLAIN = {"prompt", "negative", "model", "method", "sampler", "steps", "guidance", "true_guidance", "seed", "count", "batched", "allow_partial", "anchored",
          "windows", "named_only", "vae"}
_PICTURE = ("strength", "mask", "soft", "fit")

_HINTS = {  # flags as other tools call them, and how to say it here
    **dict.fromkeys(("--cfg", "--cfg-scale", "--cfg_scale", "--guidance-scale", "--scale"), "the guidance scale is --guidance, as in --guidance 5"),
    **dict.fromkeys(("--distilled-cfg", "--distilled-cfg-scale"), "the distilled guidance is --guidance, and CFG beside it --true-guidance"),
    **dict.fromkeys(("--width", "--height", "--w", "--h", "-W", "-H", "--resolution"), "the size is --size WIDTHxHEIGHT, as in --size 512x768"),
    **dict.fromkeys(("--weight", "--weights", "--lora-weight", "--lora-scale"), "a LoRA's weight stands behind its name, as in "
                    "--lora owl:0.8"),
    **dict.fromkeys(("--controlnet", "--control-image", "--control_image", "--condition", "--conditions", "--image", "--control-scale",
                     "--controlnet-scale", "--spatial-image", "--subject-image"), "a picture that controls is --control NAME=PICTURE:STRENGTH, as in "
                    "--control canny=photo.png:0.8; one to start from is --picture photo.png"),
    **dict.fromkeys(("--init-image", "--init-img", "--input-image", "--img2img", "--start"), "a picture to start from is --picture photo.png"),
    **dict.fromkeys(("--denoise", "--denoising-strength", "--image-strength"), "how much of --picture is made anew is --strength, as in --strength 0.6"),
    **dict.fromkeys(("--mask-blur", "--feather", "--mask-image"), "the mask is --mask PICTURE, its soft edge --soft PIXELS"),
    **dict.fromkeys(("--hires-fix", "--hr-scale", "--upscale", "--hires-scale"), "the hires pass is --hires FACTOR:STRENGTH, as in --hires 1.5:0.5"),
    **dict.fromkeys(("--annotator", "--preprocessor", "--processor"), "the annotator of a picture is \"annotator\" in --control's JSON, as in "
                    "--control '{\"source\": \"canny\", \"image\": \"photo.png\", \"annotator\": \"scribble\"}'"),
    **dict.fromkeys(("--textual-inversion", "--embeddings", "--ti"), "a textual inversion is --embedding FILE:WORD, or embedding:NAME in the prompt"),
    **dict.fromkeys(("--vae-path", "--vae_path", "--autoencoder"), "another VAE is --vae FOLDER, a .safetensors file or a hub id"),
    **dict.fromkeys(("--request", "--config", "--params"), "a request file is --from FILE.json, and is written with --save-request FILE.json"),
    **dict.fromkeys(("--loras", "--lora-path"), "each LoRA has a --lora of its own, as in --lora owl --lora ink:0.5"),
    **dict.fromkeys(("--prompt", "-p"), 'the prompt stands by itself, in quotes, as in medley generate "an owl in the snow"'),
    **dict.fromkeys(("--negative-prompt", "--negative_prompt", "--neg", "-n"), 'what to avoid is --negative "..."'),
    **dict.fromkeys(("--num-images", "--num-images-per-prompt", "--batch-size", "--batch", "--n-iter", "--num"), "the number of pictures is "
                    "--count, as in --count 4"),
    **dict.fromkeys(("--scheduler", "--sampler-name", "--sampling-method"), 'the sampler is --sampler, as in --sampler "Euler a"'),
    **dict.fromkeys(("--num-inference-steps", "--num-steps", "--sampling-steps"), "the steps are --steps, as in --steps 25"),
    **dict.fromkeys(("--checkpoint", "--ckpt", "--sd-model", "--base-model"), "the model is --model"),
}


def hinted(words: str, command: str) -> str:
    """The command line's own complaint, with what to write instead where another tool's word was used, or a prompt without quotes."""
    if option := re.match(r"No such option: (-{1,2}[\w-]+)", words):
        hint = _HINTS.get(option[1])
        return f"there is no {option[1]}: {hint}" if hint else words
    if command in ("generate", "compare") and (extra := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)$", words, re.DOTALL)):
        return (f"{extra[1]!r:.200} is more than one word where one was expected: put the prompt in quotes, as in medley {command} "
                '"a raccoon in the snow"')
    return words
