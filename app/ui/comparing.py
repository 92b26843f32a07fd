"""The tab that makes one picture in many ways, side by side: methods, weights, sets of LoRAs, seeds."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from app import concepts
from app.cost import evaluations, spoken
from app.errors import sentence
from app.ui import job_view, method_choice, tiles
from app.ui.gallery import Gallery
from app.ui.making import Maker
from app.ui.scripts import script
from composition import Request, record
from composition.methods import Method

if TYPE_CHECKING:
    from app.ui.compose_form import ComposeForm

FIRST = ("merge", "clora-fast", "switch", "composite")  # the methods compared unless others are chosen
VARIATIONS = 4
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
Changes = dict[Any, Any]
Use = Callable[[gr.EventData], Changes]


class CompareTab:
    """Its components and what they do. It compares what the form of the Compose tab says, or a picture that is there."""

    def __init__(self, maker: Maker, gallery: Gallery) -> None:
        self._maker, self._gallery = maker, gallery

    def draw(self, methods: Mapping[str, Method]) -> None:
        gr.Markdown("The prompt and the LoRAs of Compose, with the same seed, by each of these methods. The judge looks for every LoRA's concept "
                    "(bundled models).", elem_id="compare-about")
        with gr.Row():
            self.methods = gr.Dropdown(method_choice.choices(methods), value=[name for name in FIRST if name in methods], multiselect=True, label="Methods",
                                       min_width=300, scale=3, elem_id="compare-with")
            self.seeds = gr.Slider(1, 8, 1, step=1, label="Seeds", min_width=140, scale=1, elem_id="compare-seeds")
            self.factors = gr.Textbox("1", label="Times the weights", info="As 0.6, 1", min_width=140, scale=1, max_length=100, elem_id="compare-weights")
            self.also = gr.CheckboxGroup([(title, key) for key, title in tiles.ALSO.items()], value=["none"], label="Also", min_width=200, scale=2, elem_id="compare-also")
        with gr.Row(elem_id="compare-actions"):
            self.go = gr.Button("Compare", variant="primary", elem_id="compare-go")
            self.cancel = gr.Button("Cancel", interactive=False, scale=0, min_width=110, elem_id="compare-cancel")
        self.status = gr.HTML(elem_id="compare-status")
        self.grid = gr.HTML("", js_on_load=script("use"), elem_id="compare-grid", apply_default_css=False)
        self.number = gr.State(0)

    def wire(self, form: "ComposeForm", tabs: gr.Tabs, *, variations: tuple[gr.Button, gr.State], others: tuple[gr.Button, gr.State], use: tuple[Use, Sequence[Any]]) -> None:
        """variations, others: the buttons of a result, and the address of its picture. use: what "Use this" does, and what it changes."""
        self._form, self._tabs = form, tabs
        mine = [self.status, self.grid, self.go, self.cancel, self.number]
        more: dict[str, Any] = QUIET | {"concurrency_limit": None, "trigger_mode": "once"}
        self.go.click(self._compare, [self.methods, self.seeds, self.factors, self.also, *form.inputs], mine, **more)
        variations[0].click(self._vary, variations[1], [tabs, *mine], **more)
        others[0].click(self._others, [others[1], self.methods, self.also], [tabs, *mine], **more)
        self.cancel.click(self._maker.jobs.cancel, self.number, None, queue=False, **QUIET)

        self.grid.use(use[0], None, use[1], queue=False, **QUIET)

    # what happens ------------------------------------------------------------------------------------------------------

    async def _compare(self, visitor: gr.Request, names: Sequence[str], seeds: int, text: str, also: Sequence[str], *answers: Any) -> AsyncIterator[Changes]:
        try:
            request = await asyncio.to_thread(self._form.request, answers)
            ways = tiles.ways(request, names or [], int(seeds), tiles.factors(text), also or [])
        except Exception as error:
            yield {self.status: job_view.refusal(sentence(error))}
            return
        async for change in self._pictures(ways, visitor.session_hash or ""):
            yield change

    async def _vary(self, visitor: gr.Request, address: str) -> AsyncIterator[Changes]:
        """The next seeds of a picture."""
        async for change in self._again(visitor, address, lambda request: tiles.ways(request, [request.method], VARIATIONS + 1)):
            yield change

    async def _others(self, visitor: gr.Request, address: str, names: Sequence[str], also: Sequence[str]) -> AsyncIterator[Changes]:
        """A picture by these methods too."""
        async for change in self._again(visitor, address, lambda request: tiles.ways(request, list(dict.fromkeys([request.method, *(names or [])])), 1, also=also or [])):
            yield change

    async def _again(self, visitor: gr.Request, address: str, plan: Callable[[Request], list[tiles.Way]]) -> AsyncIterator[Changes]:
        path = self._gallery.path(address)
        if path is None:
            yield {self.status: job_view.refusal("make a picture first")}
            return
        yield {self._tabs: gr.Tabs(selected="compare")}
        request = record.by_name(await asyncio.to_thread(record.read, path))
        async for change in self._pictures(plan(request), visitor.session_hash or ""):
            yield change

    async def _pictures(self, ways: Sequence[tiles.Way], client: str) -> AsyncIterator[Changes]:
        """Each way in turn through the line of jobs; cancelling one ends the comparison."""
        row = [tiles.Tile(way) for way in ways]
        yield {self.go: gr.Button(interactive=False), self.cancel: gr.Button(interactive=True), self.grid: tiles.grid(row), self.status: _progress(0, row)}
        stopped = False
        for number, tile in enumerate(row):
            if stopped:
                tile.state = "not made"
                continue
            async for change in self._picture(tile, client):
                yield change | {self.grid: tiles.grid(row), self.status: _progress(number, row)}
            stopped = tile.state == "cancelled"
        line = '<p class="status" role="status">Cancelled.</p>' if stopped else _progress(len(row), row)
        yield {self.go: gr.Button(interactive=True), self.cancel: gr.Button(interactive=False), self.number: 0, self.grid: tiles.grid(row), self.status: line}

    async def _picture(self, tile: tiles.Tile, client: str) -> AsyncIterator[Changes]:
        try:
            job = self._maker.submit(tile.way.request, client)
        except Exception as error:
            tile.state, tile.failed = sentence(error), True
            return
        looks = self._maker.looks(job, client)
        shown = ""
        yield {self.number: job.number}
        try:
            async for over in looks:
                where = f"step {job.step} of {job.steps}" if job.steps else f"{before} before this one" if (before := self._maker.jobs.before(job)) else "next"
                if not over and where != shown and (job.step % 5 == 0 or not shown):
                    tile.state = shown = where
                    yield {}
        finally:
            await looks.aclose()
        tile.state = job.error or (job.state if job.finished.is_set() else "cancelled")
        if job.result is None or job.path is None:
            tile.failed = job.state == "failed"
            return
        result = job.result
        tile.verdicts = await asyncio.to_thread(concepts.verdicts, result.request, result.receipts, result.images[0])
        tile.address, tile.size = self._gallery.address(job.path), result.images[0].size
        tile.seconds, tile.evaluations = sum(result.seconds.values()), result.notes.get("evaluations", 0)
        yield {}


def _progress(done: int, row: Sequence[tiles.Tile]) -> str:
    if done >= len(row):
        return f'<p class="status done" role="status">{len(row)} pictures, {sum(tile.seconds for tile in row):.1f} s.</p>'
    times = [tile.seconds / max(1.0, evaluations(tile.way.request)) for tile in row if tile.address]
    left = sum(evaluations(tile.way.request) for tile in row[done:]) * sum(times) / len(times) if times else 0.0
    words = f"Picture {done + 1} of {len(row)}" + (f", about {spoken(left)} left" if left >= 1 else "")
    return f'<div class="status running" role="status"><span>{words}</span><progress aria-label="pictures made" max="{len(row)}" value="{done}"></progress></div>'

