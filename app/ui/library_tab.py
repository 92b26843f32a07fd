"""The tab with all LoRAs: what the catalogue knows of each, which are the same, and what some of them do to each other."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from app import overlaps
from app.drawing.strength_plot import plot
from app.errors import sentence
from app.terminal import printable
from app.ui import job_view
from app.ui.cards import Card, data_url
from app.ui.compose_form import ComposeForm
from app.ui.suggestions import Suggestions
from composition import Refused

if TYPE_CHECKING:
    from composition import Engine
    from composition.loras.conflicts import Conflicts
    from retrieval.cards import Card as Known

SHOWN = 300
TOGETHER = 6  # LoRAs that are looked at together
SWIFT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}


class LibraryTab:
    """Its components and what they do."""

    def __init__(self, engine: "Engine", form: ComposeForm, suggestions: Suggestions) -> None:
        self._engine, self._form, self._suggestions = engine, form, suggestions

    def draw(self) -> gr.Tab:
        with gr.Tab("Library", id="library") as tab:
            with gr.Row():
                self.words = gr.Textbox(label="Search", placeholder="name, category or trigger words", max_length=200, min_width=220, elem_id="library-words")
                self.some = gr.Dropdown([], value=[], multiselect=True, max_choices=TOGETHER, label="Do these get along?", min_width=260, elem_id="library-some")
                self.look = gr.Button("Look for conflicts", size="sm", min_width=150, scale=0, elem_id="library-look")
            self.report = gr.HTML(elem_id="library-report")
            self.status = gr.HTML(elem_id="library-status")
            self.rows = gr.HTML(elem_id="library-rows")
        return tab

    def wire(self, tab: gr.Tab) -> None:
        outputs = [self.rows, self.status, self.some]
        gr.on([tab.select, self.words.change], self._shown, [self.words, self.some], outputs, trigger_mode="always_last", **SWIFT)
        self.look.click(self._conflicts, self.some, self.report, api_visibility="private", show_progress="minimal", concurrency_limit=1)

    # what happens ------------------------------------------------------------------------------------------------------

    def _shown(self, words: str, chosen: Any) -> tuple[str, str, Any]:
        shelf, wanted = self._form.shelf(), (words or "").lower().split()
        matching = [card for card in shelf.values() if all(word in " ".join([card.key, card.title, card.category, *card.triggers]).lower() for word in wanted)]
        known = self._known(shelf)
        twins = _twins(known)
        rows = "".join(_row(card, known.get(card.key), twins.get(card.key, [])) for card in matching[:SHOWN])
        table = ('<table class="lora-table"><thead><tr><th scope="col">LoRA</th><th scope="col">Kind</th><th scope="col">Trigger words</th><th scope="col">File</th>'
                 f'<th scope="col">Health</th></tr></thead><tbody>{rows}</tbody></table>') if rows else ""
        count = f"{len(matching)} of {len(shelf)} LoRAs. {self._suggestions.state}"
        usable = [(card.title, card.key) for card in shelf.values() if not card.trouble]
        return table, job_view.line(count), gr.Dropdown(choices=usable, value=[key for key in chosen or [] if key in shelf])

    def _known(self, shelf: Mapping[str, Card]) -> dict[str, "Known"]:
        """What the catalogue has of each card's file; nothing until it was read."""
        by_path = self._suggestions.known()
        return {key: by_path[path] for key, path in self._paths(shelf).items() if path in by_path}

    def _paths(self, shelf: Mapping[str, Card]) -> dict[str, Path]:
        paths = {}
        for key, card in shelf.items():
            if not card.trouble:
                try:
                    paths[key] = self._engine.find(card.source).absolute()
                except Refused:  # gone since the shelf was looked at
                    continue
        return paths

    def _conflicts(self, chosen: Any) -> str:
        try:
            if not 2 <= len(chosen or []) <= TOGETHER:
                raise Refused(f"choose two to {TOGETHER} LoRAs")
            paths = self._paths(self._form.shelf())
            if gone := [key for key in chosen if key not in paths]:
                raise Refused(f"LoRA {gone[0]!r} is not there any more: reload the page")
            conflicts, _ = overlaps.compared([paths[key] for key in chosen], self._engine.name)
        except Exception as error:  # the page stays as it is, with a sentence
            return job_view.refusal(sentence(error))
        return _report(conflicts)


def _twins(known: Mapping[str, "Known"]) -> dict[str, list[str]]:
    """For each card those with the same tensors."""
    by_tensors: dict[str, list[str]] = {}
    for key, card in known.items():
        by_tensors.setdefault(card.tensor_sha256 or f"unread {key}", []).append(key)
    return {key: [other for other in keys if other != key] for keys in by_tensors.values() for key in keys if len(keys) > 1}


def _row(card: Card, known: "Known | None", twins: Sequence[str]) -> str:
    facts, health = [], []
    if card.trouble:
        health.append(card.trouble)
    if known is not None:
        facts = [known.family.replace("unknown", ""), f"rank {'/'.join(map(str, sorted(known.ranks)))}" if known.ranks else "", f"{known.size / 1e6:.1f} MB", known.licence]
        health += [known.trouble, *known.remarks, f"{known.no_effect} layers do nothing" if known.no_effect else ""]
    health += [f"the same as {', '.join(twins)}"] if twins else []
    lines = [printable(each) for each in dict.fromkeys(health) if each]
    picture = f'<img src="{card.preview}" alt="">' if card.preview else ""
    return (f'<tr data-key="{escape(card.key)}"><th scope="row">{picture}<span>{escape(card.title)}<small>{escape(card.key)}</small></span></th><td>{escape(card.category)}</td>'
            f'<td title="{escape(card.origin)}">{escape(", ".join(card.triggers[:8]))}</td><td>{escape(printable(", ".join(filter(None, facts))))}</td>'
            f'<td class="{"ill" if lines else "well"}">{escape("; ".join(lines)[:400]) or "good"}</td></tr>')


def _report(of: "Conflicts") -> str:
    pairs = "".join(f"<li>{escape(printable(overlaps.line(overlap)))}</li>" for overlap in of.overlaps)
    weights = ", ".join(f"{name} {weight:g}" for name, weight in of.weights.items() if weight)
    sheet = data_url(plot(of.strengths, "").convert("RGB"))
    return (f'<div class="report conflicts"><p><strong>{escape(printable(of.sentence))}</strong></p><p>To begin with: {escape(printable(weights))}, method {escape(of.method)} '
            f'({escape(printable(of.why))}).</p><ul>{pairs}</ul><img src="{sheet}" alt="how strong each LoRA is, block by block"></div>')
