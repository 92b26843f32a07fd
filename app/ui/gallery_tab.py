"""The tab with everything made: found by LoRA, method and star; recalled, starred, deleted, taken away as one file."""

import secrets
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.ui import job_view, made
from app.ui.gallery import Gallery
from app.ui.made import Kept
from app.ui.scripts import script
from composition import Refused

SHOWN = 120  # pictures at a time
MOST_BYTES = 500_000_000  # of one archive
SWIFT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}


class GalleryTab:
    """Its components and what they do. folder: where pictures are."""

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        self._gallery, self._folder = gallery, folder

    def draw(self) -> gr.Tab:
        with gr.Tab("Gallery", id="gallery") as tab:
            with gr.Row(elem_id="gallery-filter"):
                self.lora = gr.Dropdown([("Any LoRA", "")], value="", label="LoRA", min_width=150, elem_id="gallery-lora")
                self.method = gr.Dropdown([("Any method", "")], value="", label="Method", min_width=150, elem_id="gallery-method")
                self.words = gr.Textbox(label="Words of the prompt", min_width=150, max_length=200, elem_id="gallery-words")
                self.starred = gr.Checkbox(False, label="Starred only", min_width=120, elem_id="gallery-starred")
                self.archive = gr.Button("Pack for download", size="sm", min_width=130, elem_id="gallery-pack")
            self.status = gr.HTML(elem_id="gallery-status")
            self.grid = gr.HTML("", js_on_load=script("gallery"), elem_id="gallery-grid", apply_default_css=False)
        return tab

    def wire(self, tab: gr.Tab, use: tuple[Callable[[gr.EventData], Any], Sequence[Any]]) -> None:
        """use: what "Use this" does, and what it changes."""
        filters = [self.lora, self.method, self.words, self.starred]
        outputs = [self.grid, self.status, self.lora, self.method]
        gr.on([tab.select, self.lora.input, self.method.input, self.words.change, self.starred.input], self._shown, filters, outputs, trigger_mode="always_last", **SWIFT)
        self.grid.use(use[0], None, use[1], **SWIFT)
        self.grid.star(self._star, filters, outputs, **SWIFT)
        self.grid.remove(self._delete, filters, outputs, **SWIFT)
        self.archive.click(self._pack, filters, self.status, show_progress="minimal", api_visibility="private")

    def matching(self, lora: str, method: str, words: str, starred: bool) -> list[Kept]:
        """The pictures that the filters let through, newest first."""
        wanted = (words or "").lower().split()
        return [each for each in made.pictures(self._folder) if (not lora or lora in each.loras) and (not method or each.method == method)
                and (not starred or each.starred) and all(word in each.prompt.lower() for word in wanted)]

    # what happens ------------------------------------------------------------------------------------------------------

    def _shown(self, lora: str, method: str, words: str, starred: bool) -> tuple[str, str, Any, Any]:
        every = list(made.pictures(self._folder))
        matching = self.matching(lora, method, words, starred)
        count = f"{len(matching)} of {len(every)} pictures" + (f", the newest {SHOWN} are shown" if len(matching) > SHOWN else "") + "."
        loras = sorted({name for each in every for name in each.loras} | ({lora} if lora else set()))
        methods = sorted({each.method for each in every} | ({method} if method else set()))
        return (self._grid(matching[:SHOWN]), job_view.line(count if every else "Nothing was made yet."),
                gr.Dropdown(choices=[("Any LoRA", ""), *((name, name) for name in loras)], value=lora),
                gr.Dropdown(choices=[("Any method", ""), *((name, name) for name in methods)], value=method))

    def _grid(self, matching: Sequence[Kept]) -> str:
        return f'<div class="tiles flow">{"".join(self._tile(each) for each in matching)}</div>' if matching else ""

    def _tile(self, of: Kept) -> str:
        address = escape(self._gallery.served(of.path))
        words, loras = escape(of.prompt), escape(", ".join(of.loras) or "no LoRA")
        star = "Take the star from" if of.starred else "Star"
        return (f'<figure class="tile"><a href="{address}" target="_blank" rel="noopener"><img src="{address}" alt="{words}" loading="lazy"></a>'
                f'<figcaption title="{words}">{words}</figcaption><p class="cost">{loras}; {escape(of.method)}, seed {of.seed}</p><div class="does">'
                f'<button type="button" class="use" data-use="{address}" aria-label="Use {escape(of.path.name)}">Use this</button>'
                f'<button type="button" class="use" data-star="{address}" aria-pressed="{str(of.starred).lower()}" aria-label="{star} {escape(of.path.name)}">{"★" if of.starred else "☆"}</button>'
                f'<button type="button" class="use" data-delete="{address}" aria-label="Delete {escape(of.path.name)}">×</button></div></figure>')

    def _named(self, address: Any) -> Path:
        path = self._gallery.path(str(address))
        if path is None:
            raise Refused("that picture is not here any more")
        return path

    def _star(self, lora: str, method: str, words: str, starred: bool, event: gr.EventData) -> Any:
        made.star(self._named(event.address), bool(event.on))
        return self._shown(lora, method, words, starred)

    def _delete(self, lora: str, method: str, words: str, starred: bool, event: gr.EventData) -> Any:
        made.delete(self._named(event.address))
        return self._shown(lora, method, words, starred)

    def _pack(self, lora: str, method: str, words: str, starred: bool) -> str:
        """All pictures found as one archive, and a link to it. Each takes the place of the one before."""
        matching = self.matching(lora, method, words, starred)
        size = sum(each.path.stat().st_size for each in matching)
        if not matching or size > MOST_BYTES:
            return job_view.refusal("there is nothing to pack" if not matching else f"these pictures have over {MOST_BYTES // 10**6} MB: choose fewer")
        self._gallery.forget_archives()  # before there are two on the disk
        path = Path(tempfile.mkdtemp(prefix="medley-packed-")) / f"medley-{secrets.token_hex(3)}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for each in matching:
                archive.write(each.path, each.path.name)
        address = self._gallery.archive(path)
        return f'<p class="status done"><a id="packed" href="{escape(address)}" download="{escape(path.name)}">Download {len(matching)} pictures</a> ({size / 1e6:.1f} MB)</p>'
