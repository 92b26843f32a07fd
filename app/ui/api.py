"""The page's actions for programs: endpoints by name, with the words of their docstrings, through the same line of jobs as the page.

LoRAs, methods and pictures are named by what `loras`, `methods` and `generate` answer; nothing takes a path or an address elsewhere.
"""

import asyncio
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr

from app import concepts, remarks
from app.cost import evaluations
from app.errors import sentence
from app.jobs import Job
from app.ui import recalling, tiles
from app.ui.compose_form import ComposeForm, read_size
from app.ui.gallery import Gallery
from app.ui.making import Maker
from app.ui.suggestions import Suggestions
from composition import Lora, Refused, Request, record

if TYPE_CHECKING:
    from composition import Engine

ENDPOINTS = ("generate", "compare", "loras", "methods", "suggest", "estimate", "recall")


class Api:
    """The endpoints. Each answers plain JSON; what is refused is an error with one sentence."""

    def __init__(self, engine: "Engine", form: ComposeForm, maker: Maker, gallery: Gallery, suggestions: Suggestions) -> None:
        self._engine, self._form, self._maker, self._gallery, self._suggestions = engine, form, maker, gallery, suggestions

    def draw(self) -> None:
        """Open the endpoints of the page that is being built."""
        for name in ENDPOINTS:
            gr.api(getattr(self, name), api_name=name, concurrency_limit=None if name in ("generate", "compare") else 4)

    async def generate(self, prompt: str, loras: list[dict[str, Any]] | None = None, method: str = "merge", options: dict[str, Any] | None = None, negative: str = "",
                       steps: int = 0, guidance: float = -1.0, size: str = "", sampler: str = "default", seed: int = -1, request: gr.Request = None) -> dict[str, Any]:  # type: ignore[assignment]
        """Make a picture from a prompt and LoRAs.

        Args:
            prompt: What to draw.
            loras: [{"name": "wolf", "weight": 0.8, "binds": "the wolf"}]; a name that `loras` answers; weight and binds may be left out.
            method: How the LoRAs are combined, a name that `methods` answers.
            options: Of the method, by name.
            negative: What not to draw.
            steps: 0 for the model's usual number.
            guidance: Below 0 for the model's usual guidance.
            size: "512x768" in pixels, empty for the model's own.
            sampler: Its name.
            seed: Below 0 for a random one.
        Returns:
            picture (its address on this server), seed, seconds, evaluations, receipts, remarks, and concepts: what the judge finds.
        """
        try:
            asking = self._request(prompt, loras, method, options, negative, steps, guidance, size, sampler, seed)
            return await self._picture(asking, request)
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    async def compare(self, prompt: str, loras: list[dict[str, Any]] | None = None, methods: list[str] | None = None, seeds: int = 1, steps: int = 0, seed: int = -1,
                      request: gr.Request = None) -> list[dict[str, Any]]:  # type: ignore[assignment]
        """Make the same picture by several methods, and without any LoRA, with the same seeds.

        Args:
            prompt: What to draw.
            loras: As of `generate`.
            methods: Names that `methods` answers; none for merge, clora-fast, switch and composite.
            seeds: How many, from the first one on.
            steps: 0 for the model's usual number.
            seed: The first; below 0 for a random one.
        Returns:
            For each picture its title, and what `generate` answers, or an error.
        """
        try:
            first = self._request(prompt, loras, "merge", None, "", steps, -1.0, "", "default", seed)
            ways = tiles.ways(first, methods or ["merge", "clora-fast", "switch", "composite"], max(1, seeds), also=["none"])
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        answers = []
        for way in ways:
            try:
                answers.append({"title": way.title, **await self._picture(way.request, request)})
            except Refused as error:
                answers.append({"title": way.title, "seed": way.request.seed, "error": sentence(error)})
        return answers

    def loras(self, words: str = "") -> list[dict[str, Any]]:
        """The LoRAs that can be used.

        Args:
            words: Only those whose name, category or trigger words have all of these.
        Returns:
            name, title, category, trigger words, and why a file cannot be used.
        """
        wanted = words.lower().split()
        return [{"name": card.key, "title": card.title, "category": card.category, "triggers": list(card.triggers), "trouble": card.trouble}
                for card in self._form.shelf().values() if all(word in " ".join([card.key, card.title, card.category, *card.triggers]).lower() for word in wanted)]

    def methods(self) -> list[dict[str, Any]]:
        """The ways of combining LoRAs: name, title, what each does, evaluations a step, and the paper."""
        return [{"name": method.name, "title": method.title, "about": method.about, "evaluations": method.cost, "paper": method.paper}
                for method in self._form.methods.values()]

    def suggest(self, prompt: str) -> list[dict[str, Any]]:
        """The LoRAs that a prompt calls for, best first, with the reason, the trigger word to add, and a weight to begin with.

        Args:
            prompt: What to draw.
        """
        return [{"name": each["key"], **{key: each[key] for key in ("title", "for", "why", "word", "weight")}} for each in self._suggestions.of(prompt, self._form.shelf())]

    def estimate(self, loras: int = 2, method: str = "merge", steps: int = 0, size: str = "") -> dict[str, Any]:
        """What a picture costs before it is made: evaluations of the denoiser and, once this machine was measured, seconds.

        Args:
            loras: How many.
            method: A name that `methods` answers.
            steps: 0 for the model's usual number.
            size: "512x768" in pixels, empty for the model's own.
        """
        try:
            request = self._request("x", None, method, None, "", steps, -1.0, size, "default", 0)
            each = evaluations(Request(prompt="", method=request.method, loras=[Lora("x")] * min(max(loras, 0), 64)))
            width, height = self._engine.backbone.size(request)
            number = request.settled(*self._engine.backbone.defaults).length
            return {"evaluations": number * each, "seconds": self._maker.jobs.seconds(number, each, width * height)}
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    def recall(self, image: str) -> dict[str, Any]:
        """What a picture was made from, ours or A1111's.

        Args:
            image: The picture as a data URL ("data:image/png;base64,..."), at most 3.2 MB.
        Returns:
            request, as JSON, and differs: what of it is not here or not the same.
        """
        try:
            of = recalling.of_file(image, "the picture")
            _, lacking = recalling.filled(self._form, self._engine, of)
            return {"request": record.by_name(of.request).json(), "differs": lacking}
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    # how -----------------------------------------------------------------------------------------------------------

    def _request(self, prompt: str, loras: list[dict[str, Any]] | None, method: str, options: Mapping[str, Any] | None, negative: str, steps: int, guidance: float,
                 size: str, sampler: str, seed: int) -> Request:
        rows = []
        for row in loras or []:
            if not isinstance(row, dict) or not isinstance(row.get("name"), str):
                raise Refused('each LoRA is {"name": ..., "weight": ..., "binds": ...}')
            rows.append({"key": row["name"], "weight": row.get("weight", 1.0), "binds": row.get("binds") or ""})
        if not (prompt or "").strip():
            raise Refused("the prompt is empty: write what to draw")
        return self._form.checked(Request(
            prompt=prompt, negative=negative, model=self._engine.name, method=method, loras=self._form.loras(rows), options=options or {}, sampler=sampler,
            steps=steps or None, guidance=guidance if guidance >= 0 else None, size=read_size(size), seed=seed if seed >= 0 else secrets.randbelow(2**32)))

    async def _picture(self, request: Request, visitor: gr.Request | None) -> dict[str, Any]:
        """A picture through the line of jobs. Raises Refused when there is none."""
        client = (visitor.session_hash if visitor else "") or ""
        job = await asyncio.to_thread(self._maker.submit, request, client)
        async for _ in self._maker.looks(job, client):
            pass
        if job.result is None or job.path is None:
            raise Refused(job.error or "the picture was cancelled")
        return await asyncio.to_thread(self._answer, job)

    def _answer(self, job: Job) -> dict[str, Any]:
        assert job.result is not None and job.path is not None
        result = job.result
        verdicts = concepts.verdicts(result.request, result.receipts, result.images[0])
        return {"picture": self._gallery.address(job.path), "seed": result.request.seed, "method": result.request.method, "seconds": round(sum(result.seconds.values()), 3),
                "evaluations": result.notes.get("evaluations", 0), "receipts": [receipt.line() for receipt in result.receipts],
                "remarks": remarks.remarks(result.notes), "concepts": [{"lora": each.lora, "phrase": each.phrase, "present": each.present} for each in verdicts]}
