"""One evaluation from the config to the report: cases, tuning, pictures, scores, statistics, files."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from app import engines
from app.errors import sentence
from app.evaluation import choice, content_style, distractors, mllm, report, testbed, tuning
from app.evaluation.cases import Case, ExpectedConcept, Problem, at_steps, clipped
from app.evaluation.collect import Collector
from app.evaluation.config import EvaluationConfig
from app.evaluation.generate import Picture, generate, supplied
from app.evaluation.summary import parts_of, per_concept, summary
from app.evaluation.variants import NONE, REFERENCES, SUPPLIED, Row, Variants, equal, interleaved, title
from composition import Refused, atomic, lock

if TYPE_CHECKING:
    from app.evaluation.scoring import Scorer
    from composition import Engine

LOCK = ".evaluation.lock"


@dataclass(frozen=True)
class Outcome:
    """The outcome: the report's document, the scored pictures, what was left out, and the page."""

    document: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    problems: Sequence[Problem]
    page: Path


class Evaluation:
    """One evaluation at work. Make it and call `run`; Ctrl-C raises Cancelled, and the same config goes on from there."""

    def __init__(self, config: EvaluationConfig, console: Console) -> None:
        self.config, self.console = config, console
        self._collector = Collector(config)
        self.tuned: list[dict[str, Any]] = []
        self._problems: list[Problem] = []  # of pictures that could not be made
        self._stack = ExitStack()

    def run(self) -> Outcome:
        """Make what is missing, score everything, write the report. Raises Refused when nothing at all can be done."""
        engines.prepare(self.config.like.model, judge=self.config.judge)
        with self._stack:
            collected = self._collector.cases()
            cases = interleaved(collected.cases, self.config.limit)
            if not cases:
                raise Refused("nothing can be evaluated: " + "; ".join(map(str, collected.problems[:3])))
            cases = at_steps(cases, self.config.steps)
            scorer = self._scorer()
            self.config.folder.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(lock.alone(self.config.folder / LOCK, f"another evaluation is at work in {self.config.folder}"))
            atomic.sweep(self.config.folder)
            variants = self._variants(cases, scorer)
            pictures = self._pictures(cases, variants)
            references, trouble = self._references(cases, scorer)
            seen = scorer.see(pictures)
            scorer.settle(pictures, seen)
            scores = scorer.score(pictures, seen, references)
            rows = [self._row(pictures[index], score) for index, score in scores.items()]
            problems = [*collected.problems, *self._problems, *scorer.problems, *trouble]
            if not rows:
                raise Refused("no picture could be made or read: " + "; ".join(map(str, problems[:3])))
            document = self._document(rows, pictures, problems, scorer)
            return Outcome(document, rows, problems, report.write(self.config.folder, rows, document))

    # pictures --------------------------------------------------------------------------------------------------------

    _opened = False

    @cached_property
    def _engine(self) -> "Engine":
        """Opened when the first picture is to be made."""
        engine = self._stack.enter_context(engines.open_engine(self.config.like.model, self.config.place))
        self._opened = True
        return engine

    def _generate(self, rows: Sequence[Row], stage: str) -> list[Picture]:
        if all(row.request is None for row in rows):
            return list(supplied(rows).values())
        pictures, problems = generate(self._engine, rows, self.config.folder, stage, self.console)
        self._problems += problems
        return pictures

    def _variants(self, cases: Sequence[Case], scorer: "Scorer") -> Variants:
        """The methods, with weights tuned, where asked for, on pictures of other sets with other noise."""
        variants = Variants({name: self.config.options.get(name, {}) for name in self.config.methods})
        if not self.config.tune or self.config.manifest is not None:
            return variants
        factors = {}
        for name, size in product(self.config.tune, sorted({case.size for case in cases})):
            pilots = self._collector.pilots(size)
            for number in self.config.steps or (0,):
                rows = tuning.rows(variants, name, [replace(case, steps=number, request=replace(case.request, steps=number)) if number and case.request else case
                                                    for case in pilots])  # fmt: skip
                pictures = self._generate(rows, f"tuning {name}, {size} LoRAs")
                factor, tried = tuning.best(pictures, scorer, self.config.weight)
                factors[name, size, number] = factor
                self.tuned.append({"method": name, "size": size, "steps": number, "factor": factor, "pictures": len(pictures), "tried": tried})
        return replace(variants, factors=factors)

    def _pictures(self, cases: Sequence[Case], variants: Variants) -> list[Picture]:
        """Pictures of all variants of all cases, those at equal evaluations last; in the order of the cases."""
        rows: list[Row] = []
        for case in cases:
            if case.picture is not None:
                rows.append(Row(case, case.method or (case.request.method if case.request else SUPPLIED), None, case.picture))
            elif variants.options:
                rows += variants.rows(case)
            elif case.request:
                rows += [variants.prompt_alone(case)] if case.request.loras else []
                rows.append(Row(case, case.request.method if case.request.loras else NONE, case.request))
        rows = [row for _, row in sorted(enumerate(rows), key=lambda pair: self._order(pair[1], pair[0]))]
        pictures = self._generate(rows, "making")
        plain = {picture.row.case.key: picture.evaluations for picture in pictures if picture.row.variant == NONE and picture.evaluations}
        more = [further for picture in pictures if self.config.equal and picture.evaluations and picture.request and (further := equal(
            picture.row, picture.request, picture.evaluations, plain.get(picture.row.case.key, picture.evaluations)))]  # fmt: skip
        pictures += self._generate(more, "at equal evaluations") if more else []
        place = {case.key: index for index, case in enumerate(cases)}
        return sorted(pictures, key=lambda picture: place[picture.row.case.key])

    def _order(self, row: Row, index: int) -> tuple[Any, ...]:
        """One set's pictures together, a variant's seeds in a row: LoRAs are read, and folded, once."""
        variants = (*REFERENCES, *self.config.methods)
        return (row.case.size, row.case.group, variants.index(row.variant) if row.variant in variants else len(variants), index)

    def _references(self, cases: Sequence[Case], scorer: "Scorer") -> tuple[dict[str, Any], list[Problem]]:
        """Vectors of pictures of each LoRA alone, or of the user's own."""
        from app.evaluation.scoring import gather

        with_pictures: dict[str, ExpectedConcept] = {}  # the user's own
        alone: dict[str, Row] = {}
        for case in cases:
            for concept in case.concepts:
                if concept.references:
                    with_pictures.setdefault(concept.name, concept)
                elif self.config.references and case.request and concept.alone and (lora := case.lora(concept.name)):
                    request = replace(case.request, prompt=f"{self.config.prefix}{concept.alone}", loras=[replace(lora, weight=1.0)],
                                      steps=max(self.config.steps, default=case.request.steps), method="merge", options={}, count=1)  # fmt: skip
                    alone.setdefault(concept.name, Row(Case(f"reference/{concept.name}", 0, concept.alone, (concept,), request), "reference", request))
        rows = [Row(row.case, "reference", replace(row.request, seed=testbed.noise(row.case.group, number, True)))
                for name, row in alone.items() if name not in with_pictures and row.request for number in range(self.config.references)]  # fmt: skip
        pictures = self._generate(rows, "references") if rows else []
        return gather(pictures, scorer.see(pictures), scorer.judge, list(with_pictures.values()))

    # scores ----------------------------------------------------------------------------------------------------------

    def _scorer(self) -> "Scorer":
        from app.evaluation.scoring import Scorer
        from composition.backbones.loading import placement
        from retrieval.judge import Judge

        device = placement.choose(self.config.place.device).device  # where the engine is, or would be
        return Scorer(Judge.open(self.config.judge, str(device)), self.config.scale)

    def _row(self, picture: Picture, score: Mapping[str, Any]) -> dict[str, Any]:
        case, request = picture.row.case, picture.request or picture.row.case.request
        return {"id": picture.id, "variant": picture.row.variant, "group": case.group, "number": case.seed, "size": case.size, "steps": case.steps,
                "seed": request.seed if request else None, "prompt": request.prompt if request else case.text, "text": case.text,
                "picture": Path(os.path.relpath(picture.path, self.config.folder)).as_posix(), **score,
                "request": json.loads(request.json()) if request else None, "line": case.line}  # fmt: skip

    def _second(self, rows: Sequence[Mapping[str, Any]], variants: Sequence[str], problems: list[Problem]) -> list[dict[str, Any]] | None:
        """The second opinion, where one was asked for; an endpoint's trouble is a problem, the report is written all the same."""
        config = self.config
        if config.endpoint is None:
            return None
        try:
            return mllm.compare(config.endpoint, config.folder, rows, variants, config.pairs, resamples=config.resamples, seed=config.seed)
        except Exception as error:
            problems.append(Problem("the second opinion", f"{clipped(sentence(error))}; the answers so far are kept"))
            return None

    def _document(
        self, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Picture], problems: list[Problem], scorer: "Scorer"
    ) -> dict[str, Any]:
        config, present = self.config, list(dict.fromkeys(row["variant"] for row in rows))
        first = (*REFERENCES, *(variant for name in config.methods for variant in (name, f"{name}@equal")))
        variants = [*(variant for variant in first if variant in present), *sorted(variant for variant in present if variant not in first)]
        texts = {row["text"]: row["cut"] for row in rows}
        resampling, parts = {"resamples": config.resamples, "seed": config.seed}, parts_of(rows)
        metrics = summary(rows, variants, **resampling)
        sections = [distractors.section(parts, variants, **resampling), content_style.section(parts, variants, **resampling),
                    choice.section([picture.row.case for picture in pictures], **resampling)]  # fmt: skip
        second = self._second(rows, variants, problems)
        from app.evaluation import wording

        return {
            "title": f"Evaluation: {config.testbed or config.manifest}", "variants": variants,
            "titles": {choice.SUGGESTION: "Medley's suggestion"} | {variant: title(variant) for variant in variants},
            "pictures": len(rows), "groups": len({row["group"] for row in rows}),
            "group_word": "set" if config.testbed else "prompt", "sizes": sorted({row["size"] for row in rows}),
            "model": config.like.model if self._opened else "", "steps": sorted({row["steps"] for row in rows if row["steps"]}),
            "metrics": metrics, "sections": [section.document() for section in sections if section], "concepts": per_concept(rows, variants),
            "distractors": per_concept(rows, variants, "distractors"),
            "resamples": config.resamples, "resample_seed": config.seed, "tuned": self.tuned, "mllm": second,
            "judge": wording.judge(scorer, texts, {c["phrase"] for row in rows for c in row["concepts"]}),
            "remarks": [*wording.remarks(self.tuned, variants, second, len({row["group"] for row in rows}), scorer.judge.name),
                        *wording.orders(pictures)],
            "problems": wording.grouped(problems),
            "settings": wording.settings(replace(config, like=self._engine.settle(config.like)[0]) if self._opened else config),
        }  # fmt: skip

