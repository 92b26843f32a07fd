"""What is said when something cannot be done: Refused, Cancelled, and errors of others in the user's words."""

import re
from typing import Any

from pydantic import ValidationError

MAX_QUOTED = 200  # letters of what was given that an error repeats
MOST_FAULTS = 8  # that one refusal names


class Refused(ValueError):
    """Something the user asked for cannot be done; the message says what was given, what was expected, what to do.

    Of what was given it quotes the ends where that is long.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(sentence))


class Cancelled(Exception):
    """The run was cancelled before its next denoiser evaluation; nothing of it remains."""


_QUOTED = re.compile(rf"""(?<!\w)'[^'\n]*'|"[^"\n]*"|[^\s'"]{{{MAX_QUOTED + 1},}}""")


def shortened(sentence: str) -> str:
    """The sentence with the middle left out of every long quotation and every long word in it."""
    return _QUOTED.sub(_ends, sentence) if len(sentence) > MAX_QUOTED else sentence


def _ends(match: re.Match[str]) -> str:
    text = match[0]
    return text if len(text) <= MAX_QUOTED else f"{text[:140]}...{text[3 - MAX_QUOTED + 140:]}"


def explain(error: ValidationError) -> str:
    """A pydantic error in one line: each wrong field, what was given, what was expected."""
    parts = []
    for item in error.errors(include_url=False)[:MOST_FAULTS]:
        where = ".".join(f"{part!s:.80}" for part in item["loc"]) or "value"
        value = item["input"]
        plain = _plain(item)
        shown = f" (given {value!r:.200})" if isinstance(value, str | int | float | bool | None) and "(given" not in plain else ""
        parts.append(f"{where}: {plain:.500}{shown}")
    return shortened("; ".join(parts))


def _plain(item: Any) -> str:
    """What was expected, without the words of the library that checked it."""
    limits = item.get("ctx", {})
    words = {
        "less_than_equal": "must be at most {le:g}", "greater_than_equal": "must be at least {ge:g}", "less_than": "must be under {lt:g}", "greater_than": "must be over {gt:g}",
        "missing": "is missing", "unexpected_keyword_argument": "is no field of it", "extra_forbidden": "is no field of it",
        "finite_number": "must be a plain number", "int_parsing": "must be a whole number", "int_type": "must be a whole number",
        "int_from_float": "must be a whole number", "float_parsing": "must be a number", "float_type": "must be a number",
        "bool_parsing": "must be true or false", "bool_type": "must be true or false",
    }.get(item["type"])  # fmt: skip
    return words.format(**limits) if words else item["msg"].removeprefix("Value error, ")
