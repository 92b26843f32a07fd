"""The page: prompt, LoRAs, method and seed on the left; Generate, the picture and its receipt on the right."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from app import options
from app.errors import sentence
from app.jobs import Job, Jobs
from app.ui import controls, forms, job_view
from app.ui.cards import Card, cards, lacking, with_words
from app.ui.door import Presence
from app.ui.gallery import Gallery
from app.ui.suggestions import Suggestions
from composition import Lora, Refused, Request, methods, samplers

if TYPE_CHECKING:
    from composition import Engine

HERE = Path(__file__).parent
Changes = dict[Any, Any]  # component to its new value
FIELDS = ("prompt", "cards", "controls", "method", "random", "seed", "negative", "steps", "guidance", "true_guidance",
          "sampler", "size", "anchored", "windows", "named_only")
LOOK = 0.1  # seconds between two looks at a job
GRACE = 5.0  # seconds that a client may be away before its job is cancelled
CARDS = """<div class="loras"><div class="bar"><h2>LoRAs</h2><span class="count"></span>
<input class="find" type="search" placeholder="Filter" aria-label="Filter the LoRAs"></div><div class="suggested" role="status"></div><div class="cards"></div></div>"""


class Page:
    """The components of one page and what happens when they are touched. `blocks` is the page itself.

    It holds nothing of a visitor: what a tab has chosen is in the tab, the number of its job in the tab's state.
    """

    def __init__(self, engine: "Engine", jobs: Jobs, gallery: Gallery, presence: Presence) -> None:
        self._engine, self._jobs, self._gallery, self._presence = engine, jobs, gallery, presence
        self._suggestions = Suggestions(engine)
        usual = Request(prompt="").method
        self._methods = dict(sorted(methods.all().items(), key=lambda pair: pair[0] != usual))
        with gr.Blocks(title="Medley", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.HTML("<h1>Medley</h1><p>Several LoRAs in one picture.</p>", elem_id="title")
            with gr.Row(equal_height=False):
                with gr.Column(scale=6, min_width=280):
                    self._left()
                with gr.Column(scale=5, min_width=280, elem_id="right"):
                    self._right()
            self._wire()

    # what stands where -------------------------------------------------------------------------------------------------

    def _left(self) -> None:
        self.prompt = gr.Textbox(label="Prompt", lines=3, placeholder="a raccoon on the moon, ink drawing",
                                 info="Shift+Enter generates.", elem_id="prompt", max_length=20_000)
        with gr.Row(elem_id="lacking", visible=False) as self.lacking:
            self.hint = gr.HTML(elem_id="hint")
            self.add = gr.Button("Add trigger words", size="sm", min_width=150, scale=0, elem_id="add-words")
        self.cards = gr.HTML(
            [], html_template=CARDS, js_on_load=(HERE / "cards.js").read_text("utf-8"), apply_default_css=False,
            elem_id="loras", suggested=[],
            cards=[card.shown() for card in self._shelf().values()])
        self.controls = controls.component(self._engine)
        first = Request(prompt="").method
        self.method = gr.Radio([(method.title, name) for name, method in self._methods.items()], value=first, label="Method",
                               elem_id="method")
        self.about = gr.Markdown(self._about(first), elem_id="method-about")
        self.options: dict[str, list[Component]] = {}
        self.forms: dict[str, gr.Accordion] = {}
        for name, method in self._methods.items():
            with gr.Accordion("Options of the method", open=False, visible=False, elem_id=f"options-{name}") as form:
                self.options[name] = forms.form(method)
            if self.options[name]:
                self.forms[name] = form
        with gr.Row():
            self.random = gr.Checkbox(True, label="Random seed", info="A new one for every picture.", elem_id="random")
            self.seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        with gr.Accordion("More", open=False, elem_id="more"):
            self._more()

    def _more(self) -> None:
        usual, own = Request(prompt="").settled(*self._engine.backbone.defaults), self._engine.backbone.size(Request(prompt=""))
        self.negative = gr.Textbox(label="Negative prompt", lines=2, elem_id="negative", max_length=20_000)
        with gr.Row():
            self.steps = gr.Number(usual.steps, label="Steps", precision=0, min_width=120, elem_id="steps")
            self.guidance = gr.Number(usual.guidance, label="Guidance", step=0.5, min_width=120, elem_id="guidance")
            self.true_guidance = gr.Number(
                usual.true_guidance, label="True guidance", info="Over 1, against the negative prompt.", step=0.5, min_width=120,
                elem_id="true-guidance", visible=self._engine.backbone.embedded_guidance(usual) is not None)
            self.sampler = gr.Dropdown(samplers(), value=usual.sampler, label="Sampler", min_width=160, elem_id="sampler")
        self.size = gr.Textbox(label="Size", placeholder=f"{own[0]}x{own[1]}, the model's own", elem_id="size")
        with gr.Row():
            with gr.Column(min_width=200):
                self.windows = gr.Dropdown([("All the time", ""), ("Style late", "style"), ("Content early, style late", "both")], value="", label="LoRAs are on",
                                           info="Style in the last 70 % of the steps, content in the first 70 %.", elem_id="windows")
            with gr.Column(min_width=200):
                self.named_only = gr.Checkbox(False, label="Only LoRAs that the prompt names", info="By their trigger words.", elem_id="named-only")
                self.anchored = gr.Checkbox(False, label="Anchored guidance", info="Guide away from what the base draws without any LoRA.",
                                            elem_id="anchored")

    def _right(self) -> None:
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
            self.cancel = gr.Button("Cancel", interactive=False, scale=0, min_width=110, elem_id="cancel")
        self.status = gr.HTML(elem_id="status")
        self.stage = gr.HTML(job_view.empty(), elem_id="stage")
        self.report = gr.HTML(elem_id="report")
        self.number = gr.State(0)

    def _wire(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        swift: dict[str, Any] = quiet | {"queue": False}
        inputs = [getattr(self, name) for name in FIELDS] + [part for form in self.options.values() for part in form]
        gr.on([self.generate.click, self.prompt.submit], self._generate, inputs,
              [self.status, self.stage, self.report, self.generate, self.cancel, self.seed, self.number],
              concurrency_limit=None, trigger_mode="once", **quiet)
        self.cancel.click(self._jobs.cancel, self.number, None, **swift)
        self.method.change(self._follow, self.method, [self.about, *self.forms.values()], **swift)
        self.cards.word(self._word, self.prompt, self.prompt, **swift)
        gr.on([self.prompt.change, self.cards.change], self._hint, [self.prompt, self.cards], [self.lacking, self.hint],
              trigger_mode="always_last", **swift)
        self.prompt.change(self._suggest, self.prompt, self.cards, trigger_mode="always_last", **quiet)
        self.add.click(self._add, [self.prompt, self.cards], self.prompt, **swift)
        self.controls.look(self._look, self.size, self.controls, trigger_mode="multiple", **swift)
        self.blocks.load(lambda: (gr.HTML(cards=[card.shown() for card in self._shelf().values()]), gr.HTML(sources=controls.sources(self._engine))),
                         None, [self.cards, self.controls], **swift)

    # what happens ------------------------------------------------------------------------------------------------------

    async def _generate(self, visitor: gr.Request, *answers: Any) -> AsyncIterator[Changes]:
        """The job of one tab from Generate to its end. A tab that is closed, or loses its job, cancels it.

        What reads files or draws runs in other threads: the loop that this runs on serves every tab.
        """
        client = visitor.session_hash or ""
        try:
            job = self._jobs.submit(await asyncio.to_thread(self._request, answers), client)
        except Exception as error:  # the page stays as it is, with a sentence
            yield {self.status: job_view.refusal(sentence(error))}
            return
        try:
            yield {self.generate: gr.Button(interactive=False), self.cancel: gr.Button(interactive=True),
                   self.seed: job.request.seed, self.number: job.number, self.report: ""}
            async for change in self._watch(job, client):
                yield change
            yield {self.generate: gr.Button(interactive=True), self.cancel: gr.Button(interactive=False), self.number: 0}
        finally:
            self._jobs.cancel(job.number)

    async def _watch(self, job: Job, client: str) -> AsyncIterator[Changes]:
        """What changed on the page, at each look at the job, until it has ended or its client has gone away."""
        shown: Changes = {}
        over = False
        last = time.monotonic()
        while not over:
            if self._presence.here(client):
                last = time.monotonic()
            elif time.monotonic() - last > GRACE:
                return
            over = job.finished.is_set()  # asked before looking, so that the last look sees the end
            seen = await asyncio.to_thread(self._seen, job)
            if change := {part: value for part, value in seen.items() if shown.get(part) != value}:
                yield change
            shown = seen
            if not over:
                await asyncio.sleep(LOOK)

    def _seen(self, job: Job) -> Changes:
        """The parts of the page that show a job, as they are now."""
        report = job_view.report(job.result, job.path, self._gallery.address) if job.result and job.path else ""
        return {self.status: job_view.status(job, self._jobs.before(job)), self.stage: job_view.stage(job, self._gallery.address),
                self.report: report}

    def _request(self, answers: tuple[Any, ...]) -> Request:
        """The request of a filled-in page. Raises Refused or ValidationError for what cannot be made."""
        fields = dict(zip(FIELDS, answers, strict=False))
        method = methods.find(fields["method"])
        if not (fields["prompt"] or "").strip():
            raise Refused("the prompt is empty: write what to draw")
        for name in ("steps", "guidance", "true_guidance"):
            if fields[name] is None:
                raise Refused(f"{name.replace('_', ' ')} is empty: write a number")
        if not fields["random"] and fields["seed"] is None:
            raise Refused("the seed is empty: write a whole number, or choose a random one")
        request = Request(
            prompt=fields["prompt"] or "", negative=fields["negative"] or "", model=self._engine.name, method=method.name,
            loras=[Lora(card.source, weight=weight) for card, weight in self._chosen(fields["cards"])],
            conditions=controls.conditions(fields["controls"], [source["key"] for source in controls.sources(self._engine)]),
            options=forms.options(method, self._answers(method.name, answers[len(FIELDS):])),
            sampler=fields["sampler"], steps=fields["steps"], guidance=fields["guidance"],
            true_guidance=fields["true_guidance"],
            size=_size(fields["size"]), anchored=bool(fields["anchored"]), windows=fields["windows"] or "", named_only=bool(fields["named_only"]),
            seed=secrets.randbelow(2**32) if fields["random"] else fields["seed"])
        self._engine.backbone.size(request)  # refused now, not when its turn comes
        return request

    def _answers(self, name: str, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        """The answers to one method's form among those to all forms."""
        first = 0
        for method, form in self.options.items():
            if method == name:
                return rest[first : first + len(form)]
            first += len(form)
        raise Refused(f"no method is named {name!r}")

    def _shelf(self) -> Mapping[str, Card]:
        read_pictures = {each.path for each in self._engine.conditions()}
        return cards(path for path in self._engine.loras() if path not in read_pictures)

    def _chosen(self, value: Any) -> list[tuple[Card, float]]:
        """The cards that a tab chose, with their weights. A card is named by its key, never by a path."""
        shelf = self._shelf()
        pairs = [(str(choice["key"]), choice["weight"]) for choice in value or []]
        if gone := [key for key, _ in pairs if key not in shelf]:
            raise Refused(f"LoRA {gone[0]!r} is not there any more: reload the page")
        return [(shelf[key], weight) for key, weight in pairs]

    def _about(self, name: str) -> str:
        method = self._methods[name]
        cost = "1 evaluation a step" if method.cost == "1" else f"{method.cost} evaluations a step"
        cost += ", K being the number of LoRAs" if "K" in method.cost else ""
        return f"{method.about} {cost[0].upper()}{cost[1:]}."

    def _follow(self, name: str) -> list[Any]:
        """The line about a method, and its form in place of the others'."""
        return [self._about(name), *(gr.Accordion(visible=method == name) for method in self.forms)]

    def _word(self, prompt: str, event: gr.EventData) -> str:
        return with_words(prompt or "", [str(event.word)])

    def _suggest(self, prompt: str) -> Any:
        """The cards, with what the prompt calls for above them."""
        return gr.HTML(suggested=self._suggestions.of(prompt or "", self._shelf()))

    def _look(self, size: str, event: gr.EventData) -> Any:
        """What an annotator makes of a picture that was dropped, for a picture of this size."""
        own = self._engine.backbone.size(Request(prompt=""))
        try:
            wanted = _size(size) or own
        except Refused:  # Generate will say so
            wanted = own
        return gr.HTML(drawn=controls.look(event.image, event.annotator, event.turn, wanted))

    def _lacking(self, prompt: str, value: Any) -> list[Card]:
        shelf = self._shelf()
        return lacking(prompt or "", [shelf[choice["key"]] for choice in value or [] if choice["key"] in shelf])

    def _hint(self, prompt: str, value: Any) -> tuple[Any, str]:
        missing = self._lacking(prompt, value)
        return gr.Row(visible=bool(missing)), job_view.hint(missing)

    def _add(self, prompt: str, value: Any) -> str:
        return with_words(prompt or "", [card.triggers[0] for card in self._lacking(prompt, value)])


def _size(text: str) -> tuple[int, int] | None:
    """(width, height) in pixels; None, the model's own, for an empty field."""
    try:
        return options.size(text) if text and text.strip() else None
    except Refused as error:
        raise Refused(str(error).removeprefix("--")) from None
