"""The form of a picture: what stands in it, the request that it makes, and a request put back into it."""

import secrets
from collections.abc import Mapping
from dataclasses import fields as options_of
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from app import options
from app.jobs import Jobs
from app.ui import controls, examples, forms, lora_rows, method_choice
from app.ui.cards import Card, cards
from app.ui.drops import Drops
from app.ui.scripts import script
from composition import Lora, Refused, Request, methods, samplers

if TYPE_CHECKING:
    from composition import Engine

FIELDS = ("prompt", "cards", "controls", "method", "random", "seed", "negative", "steps", "guidance", "true_guidance",
          "sampler", "size", "anchored", "windows", "named_only")
RECALL = """<label class="recall" title="Of ours, or of A1111 and its relatives">From a picture …<input type="file" accept="image/png,image/jpeg,image/webp"
aria-label="Recall the settings of a picture"></label>"""
Changes = dict[Any, Any]  # component to its new value


class ComposeForm:
    """The components of the form. It holds nothing of a visitor: what a tab has chosen is in the tab."""

    def __init__(self, engine: "Engine", jobs: Jobs, drops: Drops) -> None:
        self._engine, self._jobs, self._drops = engine, jobs, drops
        self.methods = methods.all()
        self._parts = lora_rows.blocks(engine)

    # what stands where -------------------------------------------------------------------------------------------------

    def draw(self) -> None:
        """Its components, where they shall stand."""
        shelf = self.shelf()
        offered = examples.offered(shelf)
        first = offered[0] if offered else None
        self.prompt = gr.Textbox(first.prompt if first else "", label="Prompt", lines=2, placeholder="a raccoon on the moon, ink drawing", elem_id="prompt", max_length=20_000,
                                 info="Shift+Enter generates. <lora:name:0.8> works too.")
        with gr.Row(elem_id="examples"):
            self.examples = [(gr.Button(each.title, size="sm", min_width=0, elem_classes="example"), each) for each in offered]
            self.recall = gr.HTML("", html_template=RECALL, js_on_load=script("recall"), apply_default_css=False, elem_id="recall", min_width=0)
            self.clear = gr.Button("Clear", size="sm", min_width=0, elem_id="clear")
        with gr.Row(elem_id="lacking", visible=False) as self.lacking:
            self.hint = gr.HTML(elem_id="hint")
            self.add = gr.Button("Add trigger words", size="sm", min_width=150, scale=0, elem_id="add-words")
        self.cards = lora_rows.component(self._engine, shelf, first.rows if first else [])
        self.first = (first.method, first.rows) if first else (Request(prompt="").method, [])
        self._method(*self.first)
        self.controls = controls.component(self._engine)
        with gr.Row(elem_id="seeds"):
            self.random = gr.Checkbox(True, label="Random seed", info="A new one for every picture.", elem_id="random")
            self.seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        with gr.Accordion("More: steps, size, negative", open=False, elem_id="more"):
            self._more()

    def _method(self, name: str, rows: list[dict[str, Any]]) -> None:
        with gr.Group(elem_id="how"):
            self.goal = gr.Radio([(goal.title, key) for key, goal in method_choice.GOALS.items()], value=method_choice.goal(self.methods[name]),
                                 label="How the LoRAs are combined", elem_id="goal")
            self.method = gr.Dropdown(method_choice.choices(self.methods), value=name, label="Method", show_label=False, filterable=True, elem_id="method")
            self.about = gr.Markdown(self.describe(name, rows, None, ""), elem_id="method-about")
        self.options: dict[str, list[Component]] = {}
        self.forms: dict[str, gr.Accordion] = {}
        for name_, method in self.methods.items():
            with gr.Accordion("Options of the method", open=False, visible=name_ == name and bool(options_of(method.options)), elem_id=f"options-{name_}") as form:
                self.options[name_] = forms.form(method)
            if self.options[name_]:
                self.forms[name_] = form

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

    # to a request and back ---------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> list[Component]:
        """What `request` reads, in its order."""
        return [getattr(self, name) for name in FIELDS] + [part for form in self.options.values() for part in form]

    @property
    def outputs(self) -> list[Any]:
        """What `filled` and `emptied` change."""
        return [*self.inputs, self.goal, self.about, *self.forms.values()]

    def request(self, answers: tuple[Any, ...]) -> Request:
        """The request of a filled-in form. Raises Refused or ValidationError for what cannot be made."""
        values = dict(zip(FIELDS, answers, strict=False))
        method = methods.find(values["method"])
        if not (values["prompt"] or "").strip():
            raise Refused("the prompt is empty: write what to draw")
        for name in ("steps", "guidance", "true_guidance"):
            if values[name] is None:
                raise Refused(f"{name.replace('_', ' ')} is empty: write a number")
        if not values["random"] and values["seed"] is None:
            raise Refused("the seed is empty: write a whole number, or choose a random one")
        request = Request(
            prompt=values["prompt"] or "", negative=values["negative"] or "", model=self._engine.name, method=method.name,
            loras=self.loras(values["cards"]),
            conditions=controls.conditions(values["controls"], [source["key"] for source in controls.sources(self._engine)]),
            options=forms.options(method, self._answers(method.name, answers[len(FIELDS):])),
            sampler=values["sampler"], steps=values["steps"], guidance=values["guidance"], true_guidance=values["true_guidance"],
            size=read_size(values["size"]), anchored=bool(values["anchored"]), windows=values["windows"] or "", named_only=bool(values["named_only"]),
            seed=secrets.randbelow(2**32) if values["random"] else values["seed"])
        return self.checked(request)

    def checked(self, request: Request) -> Request:
        """The request. Raises Refused now, not when its turn comes, for a size or options that cannot be."""
        self._engine.backbone.size(request)
        methods.find(request.method).read(request.options)
        return request

    def loras(self, rows: Any) -> list[Lora]:
        """The LoRAs of these rows. Raises Refused or ValidationError."""
        return lora_rows.loras(rows, self.shelf(), self._parts)

    def _answers(self, name: str, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        """The answers to one method's form among those to all forms."""
        first = 0
        for method, form in self.options.items():
            if method == name:
                return rest[first : first + len(form)]
            first += len(form)
        raise Refused(f"no method is named {name!r}")

    def filled(self, request: Request) -> tuple[Changes, list[str]]:
        """The form with this request in it, its seed kept, and sentences on what of it is not here."""
        rows, lacking = lora_rows.rows(request, self.shelf(), self._parts)
        method = self.methods.get(request.method)
        if method is None:
            lacking.append(f"method {request.method!r:.60} is not known here")
            method = self.methods[Request(prompt="").method]
        if request.conditions:
            lacking.append(f"{len(request.conditions)} pictures that control are left out: drop them anew")
        usual = request.settled(*self._engine.backbone.defaults)
        own = self._engine.backbone.size(Request(prompt=""))
        sampler = request.sampler if request.sampler in samplers() else "default"
        size = "" if request.size in (None, own) else f"{request.size[0]}x{request.size[1]}"
        changes: Changes = {
            self.prompt: request.prompt, self.negative: request.negative, self.cards: recalled(rows), self.method: method.name,
            self.goal: method_choice.goal(method), self.random: False, self.seed: request.seed, self.steps: usual.steps, self.guidance: usual.guidance,
            self.true_guidance: request.true_guidance, self.sampler: sampler, self.size: size, self.anchored: request.anchored,
            self.windows: request.windows, self.named_only: request.named_only}  # fmt: skip
        return changes | self._shown(method.name) | dict(zip(self.options[method.name], forms.answers(method, request.options), strict=True)), lacking

    def example(self, of: examples.Example) -> Changes:
        """The form with an example in it; its steps, size and seed stay as they are."""
        return {self.prompt: of.prompt, self.cards: recalled(of.rows), self.method: of.method, self.goal: method_choice.goal(self.methods[of.method])} | self._shown(of.method)

    def emptied(self) -> Changes:
        """The form with no words and no LoRAs, and the usual method."""
        usual = Request(prompt="").method
        return {self.prompt: "", self.negative: "", self.cards: recalled([]), self.method: usual, self.goal: method_choice.goal(self.methods[usual])} | self._shown(usual)

    def _shown(self, name: str) -> Changes:
        return {form: gr.Accordion(visible=method == name) for method, form in self.forms.items()}

    # what follows a choice ---------------------------------------------------------------------------------------------

    def shelf(self) -> Mapping[str, Card]:
        """The LoRAs that can be chosen, by key."""
        read_pictures = {each.path for each in self._engine.conditions()}
        return cards((path for path in self._engine.loras() if path not in read_pictures), self._drops.files())

    def describe(self, name: str, rows: Any, steps: Any, size: str) -> str:
        """The lines under a method: what it does and what a picture costs."""
        usual, own = Request(prompt="").settled(*self._engine.backbone.defaults), self._engine.backbone.size(Request(prompt=""))
        try:
            pixels = read_size(size) or own
        except Refused:  # Generate will say so
            pixels = own
        number = int(steps or usual.length)
        used = sum(bool(row.get("on", True)) for row in rows or [])
        return method_choice.sentence(self.methods[name], used, number, lambda each: self._jobs.seconds(number, each, pixels[0] * pixels[1]))


def recalled(rows: list[dict[str, Any]]) -> gr.HTML:
    """Rows that take the place of those of a tab. (A turn, so that the same rows are set again.)"""
    return gr.HTML(recalled={"turn": secrets.token_hex(4), "rows": rows})


def read_size(text: str) -> tuple[int, int] | None:
    """(width, height) in pixels; None, the model's own, for an empty field."""
    try:
        return options.size(text) if text and text.strip() else None
    except Refused as error:
        raise Refused(str(error).removeprefix("--")) from None
