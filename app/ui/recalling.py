"""A picture's record back in the form, with a list of what differs here: of pictures made here, and of any file that is dropped."""

import base64
import binascii
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.ui.compose_form import Changes, ComposeForm
from composition import Receipt, Refused, record
from composition.record.recall import model_name

if TYPE_CHECKING:
    from composition import Engine

MOST_LETTERS = 4_400_000  # of a picture as text


def of_file(image: Any, name: Any) -> record.Record:
    """The record in a picture that a page sent. Raises Refused."""
    shown = str(name)[:80]
    if not isinstance(image, str) or not image.startswith("data:image/") or len(image) > MOST_LETTERS:
        raise Refused(f"{shown} is no picture, or has over 3.2 MB: send it with the command line, medley generate --from")
    try:
        data = base64.b64decode(image.partition(",")[2], validate=True)
    except binascii.Error:
        raise Refused(f"{shown} came damaged: drop it anew") from None
    with tempfile.NamedTemporaryFile(prefix="medley-recalled-", suffix=".png") as file:
        file.write(data)
        file.flush()
        try:
            return record.details(Path(file.name))
        except Refused as error:
            raise Refused(str(error).replace(file.name, shown)) from None


def filled(form: ComposeForm, engine: "Engine", of: record.Record) -> tuple[Changes, list[str]]:
    """The form with what a record says, and sentences on what of it is not here or is not the same. Raises Refused for what no form can hold."""
    request = record.by_name(of.request)
    changes, lacking = form.filled(request)
    if of.model and of.model != engine.name and of.model != model_name(engine.name):
        lacking.insert(0, f"it was made with the model {of.model[:100]!r}, this page has {engine.name!r}")
    lacking += of.remarks if not of.ours else ()
    return changes, [*lacking, *record.differences(of, _receipts(form, engine, request), record.versions())]


def _receipts(form: ComposeForm, engine: "Engine", request: Any) -> dict[str, Receipt]:
    """What the LoRAs of a request are here, those that are."""
    receipts = {}
    by_source: Sequence[tuple[str, str]] = [(card.key, card.source) for card in form.shelf().values() if not card.trouble]
    for name, lora in zip(request.names, request.loras, strict=True):
        source = next((source for key, source in by_source if lora.source in (key, source)), None)
        if source is not None:
            receipts[name] = engine.inspect(source)
    return receipts
