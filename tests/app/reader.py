"""An independent reader of A1111's `parameters` text, from what its own parser is known to do. Imports nothing of Medley.

The last line counts as settings only with at least three "key: value" pairs; keys are words, spaces, hyphens and
slashes; a value in double quotes is a JSON string, any other ends at the next comma; sizes WxH become two numbers;
the negative prompt runs from its label to the settings.
"""

import json
import re


def parameters(text: str) -> dict[str, str]:
    *lines, last = text.strip().split("\n")
    pairs, rest = [], last
    while found := re.match(r"\s*(\w[\w \-/]+):\s*", rest):
        rest = rest[found.end():]
        if rest.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(rest)
        else:
            end = rest.index(",") if "," in rest else len(rest)
            value = rest[:end].strip()
        pairs.append((found[1], value))
        rest = rest[end:].removeprefix(",")
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    prompt, negative, target = [], [], "prompt"
    for line in lines:
        if line.strip().startswith("Negative prompt:"):
            target, line = "negative", line.strip().removeprefix("Negative prompt:")
        (prompt if target == "prompt" else negative).append(line.strip())
    read = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    for key, value in pairs:
        if size := re.fullmatch(r"(\d+)x(\d+)", value):
            read |= {f"{key}-1": size[1], f"{key}-2": size[2]}
        else:
            read[key] = value
    return read


def hashes(value: str) -> dict[str, str]:
    """The value of `Lora hashes`: name to hash."""
    return dict(part.split(": ") for part in value.split(", ")) if value else {}


def tags(prompt: str) -> list[list[str]]:
    """The parts of every <lora:...> tag."""
    return [found.split(":") for found in re.findall(r"<lora:([^>]+)>", prompt)]
