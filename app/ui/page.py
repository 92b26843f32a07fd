"""The page: a tab to compose a picture, one to compare ways of making it, one with the pictures made, one with the LoRAs."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from app import concepts
from app.errors import sentence
from app.jobs import Job, Jobs
from app.ui import controls, job_view, lora_rows, method_choice, recalling
from app.ui.api import Api
from app.ui.cards import Card, lacking, with_words
from app.ui.comparing import CompareTab
from app.ui.compose_form import Changes, ComposeForm, read_size
from app.ui.door import Presence
from app.ui.drops import Drops
from app.ui.gallery import Gallery
from app.ui.gallery_tab import GalleryTab
from app.ui.library_tab import LibraryTab
from app.ui.making import Maker
from app.ui.suggestions import Suggestions
from composition import Refused, Request, record

if TYPE_CHECKING:
    from composition import Engine

TO_PICTURE = ("(...answers) => { if (window.innerWidth < 900) document.querySelector('#status')?.scrollIntoView({ behavior: 'smooth', block: 'start' });"
              " return answers; }")  # where the picture is far down the page
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
SWIFT: dict[str, Any] = QUIET | {"queue": False}


class Page:
    """The components of one page and what happens when they are touched. `blocks` is the page itself.

    It holds nothing of a visitor: what a tab has chosen is in the tab, the number of its job in the tab's state.
    """

    def __init__(self, engine: "Engine", jobs: Jobs, gallery: Gallery, presence: Presence, drops: Drops, folder: Path) -> None:
        self._engine, self._jobs, self._gallery = engine, jobs, gallery
        self._maker = Maker(jobs, presence)
        self._suggestions = Suggestions(engine)
        self.form = ComposeForm(engine, jobs, drops)
        self.compare, self.pictures = CompareTab(self._maker, gallery), GalleryTab(gallery, folder)
        self.library = LibraryTab(engine, self.form, self._suggestions)
        with gr.Blocks(title="Medley", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.HTML("<h1>Medley</h1><p>Several LoRAs in one picture.</p>", elem_id="title")
            with gr.Tabs(elem_id="tabs") as self.tabs:
                with gr.Tab("Compose", id="compose"), gr.Row(equal_height=False):
                    with gr.Column(scale=6, min_width=280):
                        self.form.draw()
                    with gr.Column(scale=5, min_width=280, elem_id="right"):
                        self._right()
                with gr.Tab("Compare", id="compare"):
                    self.compare.draw(self.form.methods)
                others = (self.pictures.draw(), self.library.draw())
            self._wire(*others)
            Api(engine, self.form, self._maker, gallery, self._suggestions).draw()

    def _right(self) -> None:
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
            self.cancel = gr.Button("Cancel", interactive=False, scale=0, min_width=110, elem_id="cancel")
        self.status = gr.HTML(elem_id="status")
        self.stage = gr.HTML(job_view.empty(), elem_id="stage")
        with gr.Row(visible=False, elem_id="next") as self.next:
            self.keep = gr.Button("Keep this seed", size="sm", min_width=90, elem_id="keep-seed")
            self.variations = gr.Button("Variations", size="sm", min_width=90, elem_id="variations")
            self.others = gr.Button("Compare methods", size="sm", min_width=90, elem_id="compare-methods")
        self.report = gr.HTML(elem_id="report")
        self.number = gr.State(0)
        self.address = gr.State("")  # of the picture shown

    def _wire(self, gallery_tab: gr.Tab, library_tab: gr.Tab) -> None:
        form = self.form
        gr.on([self.generate.click, form.prompt.submit], self._generate, form.inputs,
              [self.status, self.stage, self.report, self.generate, self.cancel, form.seed, self.number, self.next, self.address],
              concurrency_limit=None, trigger_mode="once", js=TO_PICTURE, **QUIET)
        self.cancel.click(self._jobs.cancel, self.number, None, **SWIFT)
        for button, example in form.examples:
            button.click(partial(form.example, example), None, form.outputs, **SWIFT)
        form.recall.recall(self._recall, None, [self.status, *form.outputs], **SWIFT)
        form.clear.click(form.emptied, None, form.outputs, **SWIFT)
        form.goal.input(self._follow_goal, form.goal, form.method, **SWIFT)
        form.method.change(self._follow, form.method, [form.goal, *form.forms.values()], **SWIFT)
        gr.on([form.method.change, form.cards.change, form.steps.change, form.size.change], form.describe,
              [form.method, form.cards, form.steps, form.size], form.about, trigger_mode="always_last", **SWIFT)
        form.cards.dropped(lambda: gr.HTML(cards=[card.shown() for card in form.shelf().values()]), None, form.cards, **SWIFT)
        form.cards.word(self._word, form.prompt, form.prompt, **SWIFT)
        gr.on([form.prompt.change, form.cards.change], self._hint, [form.prompt, form.cards], [form.lacking, form.hint],
              trigger_mode="always_last", **SWIFT)
        form.prompt.change(self._suggest, form.prompt, form.cards, trigger_mode="always_last", **QUIET)
        form.add.click(self._add, [form.prompt, form.cards], form.prompt, **SWIFT)
        form.controls.look(self._look, form.size, form.controls, trigger_mode="multiple", **SWIFT)
        self.keep.click(self._seed_of, self.address, [form.random, form.seed], **SWIFT)
        self.blocks.load(self._load, None, [form.cards, form.controls, form.about], **SWIFT)
        self.compare.wire(form, self.tabs, variations=(self.variations, self.address), others=(self.others, self.address), use=(self._use, self._used))
        self.library.wire(library_tab)
        self.pictures.wire(gallery_tab, use=(self._use, self._used))

    def _load(self) -> tuple[Any, Any, str]:
        """What may have changed since the page was built: the files, and what is known of this machine's speed."""
        method, rows = self.form.first
        return (gr.HTML(cards=[card.shown() for card in self.form.shelf().values()]), gr.HTML(sources=controls.sources(self._engine)),
                self.form.describe(method, rows, None, ""))

    # what happens ------------------------------------------------------------------------------------------------------

    async def _generate(self, visitor: gr.Request, *answers: Any) -> AsyncIterator[Changes]:
        """The job of one tab from Generate to its end. A tab that is closed, or loses its job, cancels it.

        What reads files or draws runs in other threads: the loop that this runs on serves every tab.
        """
        client = visitor.session_hash or ""
        try:
            job = self._maker.submit(await asyncio.to_thread(self.form.request, answers), client)
        except Exception as error:  # the page stays as it is, with a sentence
            yield {self.status: job_view.refusal(sentence(error))}
            return
        looks = self._maker.looks(job, client)
        try:
            yield {self.generate: gr.Button(interactive=False), self.cancel: gr.Button(interactive=True), self.form.seed: job.request.seed,
                   self.number: job.number, self.report: "", self.next: gr.Row(visible=False)}
            shown: Changes = {}
            async for _ in looks:
                seen = await asyncio.to_thread(self._seen, job)
                if change := {part: value for part, value in seen.items() if shown.get(part) != value}:
                    yield change
                shown = seen
            yield {self.generate: gr.Button(interactive=True), self.cancel: gr.Button(interactive=False), self.number: 0}
            if job.result and job.path:
                report = await asyncio.to_thread(self._report, job)
                yield {self.next: gr.Row(visible=True), self.address: self._gallery.address(job.path), self.report: report}
        finally:
            await looks.aclose()

    def _seen(self, job: Job) -> Changes:
        """The parts of the page that show a job, as they are now."""
        report = job_view.report(job.result, job.path, self._gallery.address) if job.result and job.path else ""
        return {self.status: job_view.status(job, self._jobs.before(job)), self.stage: job_view.stage(job, self._gallery.address),
                self.report: report}

    def _report(self, job: Job) -> str:
        """The report with what the judge finds."""
        assert job.result is not None and job.path is not None
        verdicts = concepts.verdicts(job.result.request, job.result.receipts, job.result.images[0])
        return job_view.report(job.result, job.path, self._gallery.address, verdicts)

    @property
    def _used(self) -> list[Any]:
        """What `_use` changes."""
        return [self.tabs, self.status, self.stage, self.report, self.next, self.address, *self.form.outputs]

    def _use(self, event: gr.EventData) -> Changes:
        """The form filled with what a picture of this page was made from, and that picture beside it."""
        address = str(event.address)
        try:
            of = self._recorded(address)
            changes, lacking = recalling.filled(self.form, self._engine, of)
        except Exception as error:  # the page stays as it is, with a sentence
            return {self.tabs: gr.Tabs(selected="compose"), self.status: job_view.refusal(sentence(error))}
        return {self.tabs: gr.Tabs(selected="compose"), self.status: job_view.line("Filled in from this picture.", lacking),
                self.stage: job_view.finished(address, of.request), self.report: "", self.next: gr.Row(visible=True), self.address: address} | changes

    def _recall(self, event: gr.EventData) -> Changes:
        """The form filled with what is written in a picture that was dropped."""
        try:
            changes, lacking = recalling.filled(self.form, self._engine, recalling.of_file(event.image, event.name))
        except Exception as error:  # the page stays as it is, with a sentence
            return {self.status: job_view.refusal(sentence(error))}
        return {self.status: job_view.line(f"Recalled from {str(event.name)[:80]}: {len(lacking)} things differ here." if lacking
                                           else f"Recalled from {str(event.name)[:80]}.", lacking)} | changes

    def _recorded(self, address: str) -> record.Record:
        path = self._gallery.path(address)
        if path is None:
            raise Refused("that picture is not here any more")
        return record.details(path)

    def _seed_of(self, address: str) -> tuple[bool, int]:
        return False, self._recorded(address).request.seed

    def _follow_goal(self, goal: str) -> str:
        """The first method of a goal."""
        return next(method.name for method in method_choice.ordered(self.form.methods) if method_choice.goal(method) == goal)

    def _follow(self, name: str) -> list[Any]:
        """The goal that a method serves, and its form in place of the others'."""
        return [method_choice.goal(self.form.methods[name]), *(gr.Accordion(visible=method == name) for method in self.form.forms)]

    def _word(self, prompt: str, event: gr.EventData) -> str:
        return with_words(prompt or "", [str(event.word)])

    def _suggest(self, prompt: str) -> Any:
        """The cards, with what the prompt calls for above them."""
        return gr.HTML(suggested=self._suggestions.of(prompt or "", self.form.shelf()))

    def _look(self, size: str, event: gr.EventData) -> Any:
        """What an annotator makes of a picture that was dropped, for a picture of this size."""
        own = self._engine.backbone.size(Request(prompt=""))
        try:
            wanted = read_size(size) or own
        except Refused:  # Generate will say so
            wanted = own
        return gr.HTML(drawn=controls.look(event.image, event.annotator, event.turn, wanted))

    def _lacking(self, prompt: str, value: Any) -> list[Card]:
        try:
            return lacking(prompt or "", [card for card, _ in lora_rows.chosen(value, self.form.shelf())])
        except Refused:  # Generate will say so
            return []

    def _hint(self, prompt: str, value: Any) -> tuple[Any, str]:
        missing = self._lacking(prompt, value)
        return gr.Row(visible=bool(missing)), job_view.hint(missing)

    def _add(self, prompt: str, value: Any) -> str:
        return with_words(prompt or "", [card.triggers[0] for card in self._lacking(prompt, value)])
