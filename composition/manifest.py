"""Manifests: JSONL files with one request a line. A line that is wrong is told by its number and costs no other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composition import untrusted
from composition.refusal import Refused
from composition.request import Request

# Fields of a line besides those of a Request: what an evaluation asks of it, and what the manifest of a folder of pictures has.
MAX_BYTES = 256 * 2**20
FIELDS = ("file_name", "concepts", "group", "text", "request")


@dataclass(frozen=True)
class Line:
    """One line of a manifest: its number, from 1, and its request, or why it has none."""

    number: int
    request: Request | None = None
    error: str = ""


def read(manifest: Path, model: str = "pocket") -> list[Line]:
    """The lines of a JSONL manifest that are not empty. model: for requests that name none.

    Raises Refused for a file that is not there or has no lines; a bad line is told by its error.
    """
    lines = []
    for number, text in texts(manifest):
        try:
            lines.append(Line(number, request_of(row_of(text), model)))
        except Refused as error:
            lines.append(Line(number, error=str(error)))
    if not lines:
        raise Refused(f"{manifest} is empty; write one request a line, as {{\"prompt\": \"a fox\", \"seed\": 1}}")
    return lines


def texts(manifest: Path) -> list[tuple[int, bytes]]:
    """Number, from 1, and bytes of every line that is not empty. Raises Refused for what is no file that can be read."""
    try:
        lines = untrusted.read(manifest, MAX_BYTES).split(b"\n")
    except untrusted.Unreadable as error:
        raise Refused(f"{manifest} {error}; give a file with one request a line, as {{\"prompt\": \"a fox\", \"seed\": 1}}") from None
    return [(number, text) for number, text in enumerate(lines, 1) if text.strip()]


def row_of(line: bytes) -> dict[str, Any]:
    """The object that a line of a manifest is. Raises Refused."""
    try:
        row = untrusted.parse(line)
    except untrusted.Unreadable as error:
        raise Refused(str(error).removeprefix("is ")) from None
    if not isinstance(row, dict):
        raise Refused(f"expected an object with the fields of a request, not {type(row).__name__}")
    return row


def request_of(row: Mapping[str, Any], model: str) -> Request:
    """The request that a manifest's line is, or holds as "request" (as the manifest of a folder of pictures does).

    model: for one that names none. Raises Refused naming every field that is wrong.
    """
    if (whole := row.get("request")) is not None:
        return Request.read(whole if isinstance(whole, str) else json.dumps(whole))
    if "file_name" in row:
        raise Refused('this line names a picture ("file_name") and has no request')
    fields = {key: value for key, value in row.items() if key not in FIELDS}
    fields.setdefault("model", model)
    if "prompt" not in fields and isinstance(row.get("text"), str):
        fields["prompt"] = row["text"]
    if "prompt" not in fields:
        raise Refused('neither a picture ("file_name") nor a request ("prompt") is named')
    return Request.read(json.dumps(fields))
