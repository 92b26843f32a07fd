"""A request as a file of its own: JSON that people can read, edit and send."""

import json
from pathlib import Path

from composition import atomic, untrusted
from composition.record import recall
from composition.record.recall import Record
from composition.refusal import Refused
from composition.request import Request

MAX_BYTES = 64 * 2**20  # of a file, pictures of its conditions included


def details(path: Path) -> Record:
    """The request of a JSON file, its own or one that a line of a manifest or a record holds. Raises Refused naming every field that is wrong."""
    try:
        document = untrusted.parse(untrusted.read(path, MAX_BYTES))
    except untrusted.Unreadable as error:
        raise Refused(f"{path} {error}") from None
    if not isinstance(document, dict):
        raise Refused(f"{path} is {type(document).__name__}, not a request: an object with its fields, as {{\"prompt\": \"a fox\"}}")
    whole = document.get("request", document)
    try:
        request = Request.read(whole if isinstance(whole, str) else json.dumps(whole))
    except Refused as error:
        raise Refused(f"{path} is {error}") from None
    return Record(request, model=request.model)


def save(request: Request, path: Path, *, keep_paths: bool = False) -> Path:
    """Write a request as a JSON file, from which `read` has an equal one. keep_paths: with the paths of its files, not only their names.

    Raises Refused where there is a file already, or none can be written.
    """
    if path.suffix.lower() != ".json":
        raise Refused(f"{path} must end in .json")
    shown = request if keep_paths else recall.without_paths(request)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(untrusted.parse(shown.json()), ensure_ascii=False, indent=2) + "\n"
        return atomic.write_new([path], text)
    except FileExistsError:
        raise Refused(f"{path} is there already and is not overwritten: choose another name, or delete it") from None
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror or error}") from None
