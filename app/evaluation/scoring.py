"""Every picture's scores: CLIPScore, each concept's score and presence, likeness to references, leakage."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from app.errors import sentence
from app.evaluation import content_style
from app.evaluation.cases import Case, ExpectedConcept, Problem, clipped
from app.evaluation.generate import Picture
from composition import pictures as door
from retrieval.judge import SCALES, Judge, clip_score, sides, threshold

PART = 64  # pictures open at a time
FEW = 40  # pictures without a concept from which a threshold can be set on them
FALSE_POSITIVES = 0.05
THINGS = ("", "character", "object")  # categories of what can stand beside another of its kind


@dataclass(frozen=True)
class Seen:
    """Vectors of one picture: whole, and its two sides where leakage is asked."""

    whole: Float[Tensor, " D"]
    sides: Float[Tensor, "2 D"] | None


class Scorer:
    """A judge at work on one evaluation. Thresholds are the judge's own, else set on this evaluation's pictures."""

    def __init__(self, judge: Judge, scale: str = "100") -> None:
        self.judge, self.scale = judge, scale
        self.problems: list[Problem] = []
        self.thresholds: dict[str, float] = {phrase: row.score for phrase, row in judge.thresholds.items()}
        self.settled: dict[str, int] = {}  # phrase to the number of pictures its threshold was set on

    def see(self, pictures: Sequence[Picture]) -> dict[int, Seen]:
        """Index to vectors; a picture that cannot be opened is a problem and left out."""
        vectors: dict[int, Seen] = {}
        for first in range(0, len(pictures), PART):
            opened = {}
            for index in range(first, min(first + PART, len(pictures))):
                image = self._open(pictures[index])
                if image is not None:
                    opened[index] = image
            if not opened:
                continue
            try:
                vectors |= self._vectors(pictures, opened)
            except Exception:  # which of them it is shows when each is seen by itself
                for index, image in opened.items():
                    with self._spared(pictures[index]):
                        vectors |= self._vectors(pictures, {index: image})
        return vectors

    def _vectors(self, pictures: Sequence[Picture], opened: Mapping[int, Image.Image]) -> dict[int, Seen]:
        """Index to vectors of open pictures, in two batches."""
        whole = self.judge.see(list(opened.values()))
        parts = {index: sides(image) for index, image in opened.items() if len(_things(pictures[index].row.case.concepts)) > 1}
        beside = self.judge.see([side for pair in parts.values() for side in pair]) if parts else None
        at = {index: 2 * place for place, index in enumerate(parts)}
        return {index: Seen(whole[place], beside[at[index] : at[index] + 2] if beside is not None and index in at else None)
                for place, index in enumerate(opened)}  # fmt: skip

    @contextmanager
    def _spared(self, picture: Picture) -> Iterator[None]:
        """What goes wrong with one picture is a problem of its own, whatever it is, and of no other."""
        try:
            yield
        except Exception as error:
            why = f"{picture.path} could not be judged: {clipped(sentence(error))}"
            self.problems.append(Problem(str(picture.path), why, picture.row.case.line))

    def _open(self, picture: Picture) -> Image.Image | None:
        try:
            return door.load(picture.path).convert("RGB")
        except Exception as error:
            why = f"is no readable picture: {clipped(sentence(error))}" if os.path.lexists(picture.path) else "is missing"
        self.problems.append(Problem(str(picture.path), f"{picture.path} {why}", picture.row.case.line))
        return None

    def settle(self, pictures: Sequence[Picture], seen: Mapping[int, Seen]) -> None:
        """Set a threshold for every phrase that has none, on the pictures of cases without it: 5 % of them pass."""
        phrases = {phrase for picture in pictures for phrase in _phrases(picture.row.case)} - self.thresholds.keys()
        for phrase in sorted(phrases):
            others = [index for index in seen if phrase not in _phrases(pictures[index].row.case)]
            if len(others) < FEW:
                continue
            try:
                text = self.judge.read([phrase])[0]
            except Exception:  # the pictures that ask for it say so
                continue
            scores = torch.stack([seen[index].whole for index in others]) @ text
            self.thresholds[phrase] = threshold(scores, scores, FALSE_POSITIVES).score
            self.settled[phrase] = len(others)

    def score(
        self, pictures: Sequence[Picture], seen: Mapping[int, Seen], references: Mapping[str, Float[Tensor, "n D"]]
    ) -> dict[int, dict[str, Any]]:
        """Index to a row of scores of the pictures seen, in order; one that cannot be scored is a problem and left out.

        references: concept's name to vectors of pictures of it.
        """
        rows, cut = {}, {}
        for index, vectors in seen.items():
            text = pictures[index].row.case.text
            with self._spared(pictures[index]):
                if text not in cut:
                    cut[text] = self.judge.cut([text])[0]
                rows[index] = self._row(pictures[index], vectors, cut, references)
        return rows

    def _row(
        self, picture: Picture, seen: Seen, cut: Mapping[str, bool], references: Mapping[str, Float[Tensor, "n D"]]
    ) -> dict[str, Any]:
        case = picture.row.case
        cosine = seen.whole @ self.judge.read([case.text])[0]
        row: dict[str, Any] = {"clipscore": float(clip_score(cosine, self.scale)), "cut": cut[case.text]}
        concepts = [self._concept(concept, seen.whole, references) for concept in case.concepts]
        present = [concept["present"] for concept in concepts]
        likeness = [concept["clip_i"] for concept in concepts if concept["clip_i"] is not None]
        scores = [concept["score"] for concept in concepts]
        known = bool(present) and None not in present
        distractors = [self._concept(concept, seen.whole, {}) for concept in case.distractors]
        shown = [concept["present"] for concept in distractors]
        row |= {
            "concepts": concepts,
            "distractors": distractors,
            "concept": sum(scores) / len(scores) if scores else None,
            "concept_min": min(scores, default=None),
            "presence": sum(present) / len(present) if known else None,
            "all_present": float(all(present)) if known else None,
            "clip_i": sum(likeness) / len(likeness) if likeness else None,
            "clip_i_min": min(likeness, default=None),
            "leakage": self._leakage(case.concepts, seen),
            "distractor_presence": sum(shown) / len(shown) if shown and None not in shown else None,
            **content_style.scores(concepts),
            "evaluations": picture.evaluations,
            "seconds": picture.seconds,
        }  # fmt: skip
        return row

    def _concept(self, concept: ExpectedConcept, whole: Float[Tensor, " D"], references: Mapping[str, Float[Tensor, "n D"]]) -> dict[str, Any]:
        cosine = float(whole @ self.judge.read([concept.phrase])[0])
        bar = self.thresholds.get(concept.phrase)
        like = references.get(concept.name)
        return {"name": concept.name, "phrase": concept.phrase, "category": concept.category, "score": 100 * cosine,
                "present": None if bar is None else cosine >= bar,
                "clip_i": None if like is None or not len(like) else 100 * float((like @ whole).mean())}  # fmt: skip

    def _leakage(self, concepts: Sequence[ExpectedConcept], seen: Seen) -> float | None:
        """1 when of two things one stands on both sides of the picture and the other is nowhere; None without two."""
        things = _things(concepts)
        if seen.sides is None or len(things) < 2 or any(thing.phrase not in self.thresholds for thing in things):
            return None
        bars = torch.tensor([self.thresholds[thing.phrase] for thing in things])
        texts = self.judge.read([thing.phrase for thing in things])
        here: Bool[Tensor, " t"] = texts @ seen.whole >= bars
        twice: Bool[Tensor, " t"] = (texts @ seen.sides.T >= bars[:, None]).all(1)
        leaked = any(bool(twice[a]) and not bool(here[b]) for a in range(len(things)) for b in range(len(things)) if a != b)
        return float(leaked)


def _phrases(case: Case) -> set[str]:
    """Of everything that a picture of the case is looked at for."""
    return {concept.phrase for concept in (*case.concepts, *case.distractors)}


def _things(concepts: Sequence[ExpectedConcept]) -> list[ExpectedConcept]:
    return [concept for concept in concepts if concept.category in THINGS]


def gather(pictures: Sequence[Picture], seen: Mapping[int, Seen], judge: Judge, with_pictures: Sequence[ExpectedConcept]) -> tuple[
    dict[str, Float[Tensor, "n D"]], list[Problem]
]:  # fmt: skip
    """Vectors of reference pictures by concept: those by the LoRA alone, or the user's own of the concepts `with_pictures`."""
    vectors: dict[str, list[Tensor]] = defaultdict(list)
    problems = []
    for index, picture in seen.items():
        vectors[pictures[index].row.case.concepts[0].name].append(picture.whole)
    for concept in with_pictures:
        images = []
        for path in concept.references:
            try:
                images.append(judge.see([door.load(Path(path)).convert("RGB")])[0])
            except Exception as error:
                problems.append(Problem(str(path), f"a reference of {clipped(concept.name)} cannot be read: {clipped(sentence(error))}"))
        if images:
            vectors[concept.name] = images
    return {name: torch.stack(rows) for name, rows in vectors.items()}, problems


def formula(scale: str) -> str:
    """CLIPScore's formula, as printed beside it."""
    return SCALES[scale]
