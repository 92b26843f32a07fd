"""The rows of LoRAs on the page as a request has them, and a request's LoRAs as rows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from app.ui.cards import Card
from app.ui.scripts import script
from composition import Lora, Refused, Request

if TYPE_CHECKING:
    from composition import Engine

PARTS = {"down": "down blocks", "mid": "middle block", "up": "up blocks", "double": "double blocks", "single": "single blocks"}
MARKUP = """<div class="loras"><div class="bar"><h2>LoRAs</h2><span class="count"></span></div><div class="rows"></div>
<div class="suggested" role="status"></div>
<input class="find" type="search" placeholder="Search LoRAs to add" aria-label="Filter the LoRAs"><div class="cards"></div>
<label class="drop">Drop a LoRA file here, or choose one<input type="file" accept=".safetensors" multiple aria-label="Add a LoRA file"></label>
<p class="said" role="status"></p></div>"""


def component(engine: "Engine", shelf: Mapping[str, Card], rows: Sequence[Mapping[str, Any]]) -> gr.HTML:
    """Where LoRAs are chosen. Its value is what `loras` reads; it triggers `word` for a trigger word that is to be added to the prompt."""
    return gr.HTML(list(rows), html_template=MARKUP, js_on_load=script("cards"), apply_default_css=False, elem_id="loras", suggested=[], recalled={},
                   cards=[card.shown() for card in shelf.values()], presets=[{"key": key, "title": title} for key, title in titles(engine).items()])


def blocks(engine: "Engine") -> list[str]:
    """The parts of a denoiser by the first word of their blocks' names, those that have a name for people."""
    seen = {engine.backbone.block(name).partition(".")[0] for name, _ in engine.backbone.denoiser.named_modules()}
    return [part for part in PARTS if part in seen]


def titles(engine: "Engine") -> dict[str, str]:
    """What a LoRA may be kept to: "" for the whole model."""
    parts = blocks(engine)
    return {"": "all blocks"} | ({part: f"{PARTS[part]} alone" for part in parts} if len(parts) > 1 else {})


def chosen(value: Any, shelf: Mapping[str, Card]) -> list[tuple[Card, Mapping[str, Any]]]:
    """The cards of the rows that are on, with their rows. A card is named by its key, never by a path. Raises Refused for one that is gone."""
    rows = [row for row in value or [] if row.get("on", True)]
    if gone := [str(row["key"]) for row in rows if str(row["key"]) not in shelf]:
        raise Refused(f"LoRA {gone[0]!r} is not there any more: reload the page")
    return [(shelf[str(row["key"])], row) for row in rows]


def loras(value: Any, shelf: Mapping[str, Card], parts: Sequence[str]) -> list[Lora]:
    """The LoRAs of a filled-in page. parts: as `blocks` has them. Raises Refused or ValidationError."""
    return [_lora(card, row, parts) for card, row in chosen(value, shelf)]


def _lora(card: Card, row: Mapping[str, Any], parts: Sequence[str]) -> Lora:
    part = row.get("blocks") or ""
    if part and part not in parts:
        raise Refused(f"this model has no {part!r:.40} blocks: reload the page")
    binds = row.get("binds") or ""
    if not isinstance(binds, str):
        raise Refused(f"what LoRA {card.title} belongs to must be words of the prompt")
    kept_to = {other: 0.0 for other in parts if other != part} if part else {}
    return Lora(card.source, weight=row["weight"], binds=binds.strip() or None, blocks=kept_to)


def rows(request: Request, shelf: Mapping[str, Card], parts: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a request's LoRAs, and sentences on what of them the page does not have or cannot show."""
    shown, lacking = [], []
    for lora in request.loras:
        card = next((card for card in shelf.values() if lora.source in (card.source, card.key) and not card.trouble), None)
        if card is None:
            lacking.append(f"LoRA {lora.name} (weight {lora.weight:g}) is not here")
            continue
        part = next((part for part in parts if {**lora.blocks} == {other: 0.0 for other in parts if other != part}), "")
        lacking += [f"{lora.name}: {what} cannot be shown on the page and is left out" for what, there in (
            ("its own weights of blocks", lora.blocks and not part), ("its part of the steps", lora.scheduled and not request.windows), ("its region", lora.region is not None),
            ("its weight in the text encoder", lora.text_weight not in (None, lora.weight))) if there]
        shown.append({"key": card.key, "weight": lora.weight, "on": lora.weight != 0.0, "binds": lora.binds or "", "blocks": part})
    return shown, lacking
