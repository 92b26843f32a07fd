"""The grammar of A1111's `parameters` text: where its settings line is, and the "key: value" pairs on it.

A value ends at the next comma, unless it is a JSON string, object or list, which is read whole. Written by hand rather than as
regular expressions, so that the time is linear in the text, whatever the text is.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from composition.refusal import Refused

MAX_LETTERS = 2_000_000
MAX_KEY = 60
KNOWN = frozenset({"steps", "sampler", "cfg scale", "distilled cfg scale", "seed", "size", "model", "model hash", "version", "schedule type",
                   "clip skip", "lora hashes", "denoising strength"})
NEGATIVE = "Negative prompt:"
_DECODER = json.JSONDecoder(strict=False)
_FAILURES = 16  # values that look like JSON and are not, after which none is tried any more


class Parts(NamedTuple):
    """pairs: key to value; a JSON object or list as it stands, a JSON string unquoted. after: lines that follow the settings."""

    prompt: str
    negative: str
    pairs: dict[str, str]
    after: tuple[str, ...]


def split(text: str) -> Parts:
    """The text taken apart. Raises Refused for one without settings, or that is too long."""
    if len(text) > MAX_LETTERS:
        raise Refused(f"the picture's parameters text has {len(text)} letters; at most {MAX_LETTERS} are read")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").strip().split("\n")
    at = next((index for index in range(len(lines) - 1, -1, -1) if _settings(pairs_of(lines[index]))), None)
    if at is None:
        raise Refused("the picture's parameters text has no settings line (Steps, Sampler, CFG scale, ...)")
    lines, at = _on_its_own(lines, at)
    prompt, negative = _prompts(lines[:at])
    after = lines[at + 1 :]
    if not negative and after and after[0].startswith(NEGATIVE):
        negative, after = "\n".join(after).removeprefix(NEGATIVE).strip(), []
    pairs = pairs_of(lines[at])
    rest = [line for line in after if line.strip() and not _continued(line, pairs)]
    return Parts(prompt, negative, pairs, tuple(rest))


def _on_its_own(lines: list[str], at: int) -> tuple[list[str], int]:
    """The lines with the settings on one of their own, and its number: after a form that took the breaks out, all is one line."""
    line = lines[at]
    start = line.rfind("Steps: ")
    if start <= 0 or any(key.lower() in KNOWN for key in pairs_of(line[:start])):
        return lines, at
    before = line[:start].rstrip(", ")
    label = before.rfind(NEGATIVE)
    head = [before[:label].rstrip(), before[label:]] if label > 0 else [before]
    return [*lines[:at], *head, line[start:], *lines[at + 1 :]], at + len(head)


def _prompts(lines: list[str]) -> tuple[str, str]:
    first = next((index for index, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[first:]).removeprefix(NEGATIVE)
    return "\n".join(lines[:first]).strip(), negative.strip()


def _settings(pairs: dict[str, str]) -> bool:
    """At least three pairs, two of them with keys that such lines have; a prompt may have colons and commas too."""
    return len(pairs) >= 3 and sum(key.lower() in KNOWN for key in pairs) >= 2


def _continued(line: str, pairs: dict[str, str]) -> bool:
    """Whether a line after the settings is more of them (Civitai resources on a line of its own); its pairs are then added."""
    more = pairs_of(line)
    if any(value[:1] in ("{", "[") for value in more.values()) or _settings(more):
        pairs.update({key: value for key, value in more.items() if key not in pairs})
        return True
    return False


def pairs_of(line: str) -> dict[str, str]:
    """The "key: value" pairs of a line, in order; the first of a key that is there twice."""
    pairs: dict[str, str] = {}
    for key, value in _pairs(line):
        pairs.setdefault(key, value)
    return pairs


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    at, failures = 0, 0
    while at < len(line):
        comma = line.find(",", at)
        comma = len(line) if comma < 0 else comma
        colon = line.find(":", at, min(comma, at + MAX_KEY + 8))
        key = line[at:colon].strip() if colon >= 0 else ""
        if not _is_key(key):
            at = comma + 1
            continue
        start = colon + 1
        while start < len(line) and line[start] == " ":
            start += 1
        if line[start : start + 1] in ('"', "{", "[") and failures < _FAILURES:
            try:
                value, end = _DECODER.raw_decode(line, start)
            except (ValueError, RecursionError):
                failures += 1
            else:
                yield key, value if isinstance(value, str) else line[start:end]
                comma = line.find(",", end)
                at = len(line) if comma < 0 else comma + 1
                continue
        yield key, line[start : max(comma, start)].strip()
        at = max(comma, start) + 1


def _is_key(key: str) -> bool:
    return 2 <= len(key) <= MAX_KEY and key[0].isalnum() and all(letter.isalnum() or letter in " _-/().+" for letter in key)
