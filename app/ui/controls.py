"""The pictures that control on the page: dropped, shown as their annotator draws them, with strength and times.

The browser shrinks a picture and sends it as text inside the request: no file is uploaded, and none of this machine is named.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from app.errors import sentence
from app.terminal import printable
from app.ui.cards import data_url
from app.ui.scripts import script
from composition import Condition, Refused, pictures
from composition.annotators import ANNOTATORS, annotate

if TYPE_CHECKING:
    from composition import Engine

MOST = 4  # pictures of one request: together they fit into what the door lets through
MAX_TEXT = 950_000  # letters of one of them
SIDE = 320  # pixels of what is shown of it
MARKUP = """<div class="controls"><div class="bar"><h2>Control by pictures</h2><span class="count"></span></div><div class="list"></div>
<label class="drop">Drop a picture that controls, or choose one<input type="file" accept="image/*" multiple
aria-label="Add a picture that controls"></label><p class="none">No condition LoRA or ControlNet for this model is there: put one into a LoRA folder.</p>
<p class="said" role="alert"></p></div>"""


def component(engine: "Engine") -> gr.HTML:
    """Where pictures are dropped. Its value is what `conditions` reads; it triggers `look` for each picture that is to be shown."""
    return gr.HTML([], html_template=MARKUP, js_on_load=script("controls"), apply_default_css=False, elem_id="controls",
                   sources=sources(engine), annotators=[{"key": name, "about": of.about} for name, of in ANNOTATORS.items() if not of.extra],
                   drawn={}, most=MOST)


def sources(engine: "Engine") -> list[dict[str, str]]:
    """What the page offers to read a picture: the model's bundled ones first, by name, never by path."""
    listed = sorted(engine.conditions(), key=lambda each: not each.bundled)
    return [{"key": each.name, "title": printable(f"{each.name} ({each.sort})"), "annotator": each.annotator} for each in listed]


def look(image: Any, annotator: Any, turn: Any, size: tuple[int, int]) -> dict[str, Any]:
    """What an annotator makes of a picture of the page, small: {turn, picture, trouble}. turn: the page's number for its question.
    size: of the picture to be made."""
    try:
        drawn = annotate(str(annotator or ""), pictures.condition(_text(image)), size)
    except Exception as error:  # the row gets a sentence, the page stays
        return {"turn": turn, "picture": "", "trouble": sentence(error)}
    drawn.thumbnail((SIDE, SIDE))
    return {"turn": turn, "picture": data_url(drawn), "trouble": ""}


def conditions(value: Any, offered: Iterable[str]) -> Sequence[Condition]:
    """The conditions of a filled-in page. offered: the keys of `sources`. Raises Refused or ValidationError."""
    rows, keys = list(value or []), set(offered)
    if len(rows) > MOST:
        raise Refused(f"{len(rows)} pictures that control; the page takes {MOST} at most")
    if gone := [str(row["source"]) for row in rows if row["source"] not in keys]:
        raise Refused(f"{gone[0]!r} is not there any more: reload the page")
    return [Condition(row["source"], _text(row["image"]), annotator=row.get("annotator"), strength=row.get("strength", 1.0),
                      start=row.get("start", 0.0), end=row.get("end", 1.0)) for row in rows]


def _text(image: Any) -> str:
    """The picture, if it is one in text: a page must not name a file of this machine."""
    if not isinstance(image, str) or not image.startswith("data:image/") or len(image) > MAX_TEXT:
        raise Refused("a picture that controls is no picture that the page can send: drop it anew")
    return image
