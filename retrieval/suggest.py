"""Which LoRAs of a library a prompt asks for: at most a few, each with the evidence, and none where none fits.

Every phrase of the prompt is searched for by itself. What a vector says of a phrase is the cosine of the two, and whether that is much is
judged against what the same LoRA's vector says of phrases that have nothing to do with the prompt (its null): a LoRA that is near everything
is near nothing. A LoRA is taken when chance would lift an unrelated one of the whole library so high too rarely (`CHANCE`), or when the prompt says its
trigger words, its name, or a word of its tags; each phrase is served once, and two LoRAs that do the same are not both taken (Carbonell and
Goldstein 1998). AutoLoRA takes the three nearest whatever they are (arXiv 2508.02107).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from retrieval.phrases import Phrase, Words, content, split, telling
from retrieval.rows import Space

MOST = 3
CHANCE = 0.02  # that some unrelated LoRA of the library is taken for a phrase
ALIKE = 0.8  # cosine of two LoRAs' vectors from which they do the same
SPOKEN, NAMED, TAGGED = 12.0, 10.0, 4.0  # what literal evidence counts, in standard deviations of a null: more than any vector
EVERYWHERE = ("style", "place")  # categories that are of the whole picture
SPREAD = 0.02  # of cosines: a null narrower than that is taken for so wide

Vectors = Float[np.ndarray, "n D"]
Queries = Callable[[Sequence[str]], Vectors]  # texts -> vectors of length 1 in one evidence's space


@dataclass(frozen=True)
class Candidate:
    """A LoRA of the library. id: of its tensors. vectors: evidence ("weight", "behaviour", ...) to a vector (D,) of length 1."""

    id: str
    name: str
    vectors: Mapping[Space, Float[np.ndarray, " D"]]
    triggers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    category: str = ""
    weight: float | None = None


@dataclass(frozen=True)
class Reason:
    """Why a LoRA was taken. evidence: "trigger", "name", "tag", or the name of a vector. words: of the prompt. score: in standard deviations
    of the LoRA's null, or what literal evidence counts; cosine: of a vector, else None."""

    evidence: str
    words: str
    score: float
    cosine: float | None = None

    def text(self) -> str:
        """A clause for people."""
        if self.evidence in ("trigger", "name", "tag"):
            thing = {"trigger": "its trigger word", "name": "its name", "tag": "a tag of it"}[self.evidence]
            return f"the prompt says {self.words!r}, {thing}"
        what = {"weight": "its weights", "behaviour": "what it does to pictures", "text": "its description"}.get(self.evidence, self.evidence)
        return f"{what} answers to {self.words!r}, {self.score:.1f} standard deviations above chance".replace("weights answers", "weights answer")


@dataclass(frozen=True)
class Suggestion:
    """One LoRA to use. phrase: the words of the prompt it serves. reasons: strongest first. trigger: the word to add to the prompt, "" when the
    prompt has one or none is known. weight: to begin with. everywhere: it serves the whole picture, and not a thing in it."""

    candidate: Candidate
    phrase: str
    everywhere: bool
    reasons: tuple[Reason, ...]
    trigger: str
    weight: float

    @property
    def score(self) -> float:
        return self.reasons[0].score


def suggest(
    prompt: str, candidates: Sequence[Candidate], queries: Mapping[Space, Queries], null: Mapping[Space, Vectors], *, most: int = MOST,
    chance: float = CHANCE, alike: float = ALIKE, count: int = 0,
) -> list[Suggestion]:
    """The LoRAs that a prompt asks for, best first.

    candidates: all of the library that could be used (of the right base), or those that a search found. queries: by evidence, what makes
    vectors of phrases; evidence without one is not looked at. null: by evidence, vectors (n, D) of phrases of all kinds, made in the same way. chance: that
    one LoRA too many is taken for a phrase because the library is large. alike: cosine from which two do the same. count: how many LoRAs the library
    has, where the candidates are those that a search returned.
    """
    phrases = split(prompt)
    if not phrases or not candidates:
        return []
    evidences = [_spoken(prompt, phrases, candidates), *(_near(phrases, candidates, evidence, make, null[evidence], threshold(max(count, len(candidates)), chance))
                                                     for evidence, make in queries.items() if evidence in null)]  # fmt: skip
    reasons: dict[tuple[int, int], list[Reason]] = {}
    for some in evidences:
        for place, reason in some:
            reasons.setdefault(place, []).append(reason)
    ranked = sorted(reasons.items(), key=lambda item: (-_worth(item[1]), item[0]))
    return _chosen(prompt, phrases, candidates, [(who, which, tuple(sorted(why, key=lambda reason: -reason.score))) for (who, which), why in ranked],
                   most, alike)  # fmt: skip


Reasons = Iterable[tuple[tuple[int, int], Reason]]  # (candidate, phrase) and the reason


def _spoken(prompt: str, phrases: Sequence[Phrase], candidates: Sequence[Candidate]) -> Reasons:
    """What the prompt says literally."""
    spoken, parts = Words(prompt), [Words(phrase.text) for phrase in phrases]
    for who, candidate in enumerate(candidates):
        kinds = [("trigger", SPOKEN, candidate.triggers), ("name", NAMED, telling(candidate.name)), ("tag", TAGGED, candidate.tags)]
        for evidence, score, words in kinds:
            literal = next((text for text in words if spoken.say(text)), "")
            if literal:
                which = next((index for index, part in enumerate(parts) if part.say(literal)), -1)
                yield (who, which), Reason(evidence, literal, score)
                break


def _near(phrases: Sequence[Phrase], candidates: Sequence[Candidate], evidence: Space, make: Queries, null: Vectors, least: float) -> Reasons:
    """What one kind of vector says, where that is more than chance. Weights are asked of LoRAs alone whose behaviour was not measured: it is what they
    are an estimate of."""
    held = [index for index, candidate in enumerate(candidates)
            if evidence in candidate.vectors and not (evidence == "weight" and "behaviour" in candidate.vectors)]  # fmt: skip
    if not held:
        return
    vectors = np.stack([candidates[index].vectors[evidence] for index in held])
    low, mean, high = np.percentile(vectors @ null.T, (16, 50, 84), axis=1)[..., None]  # what a null says by chance of the LoRA's own thing does not count
    spread = np.maximum((high - low) / 2, SPREAD)
    cosines = vectors @ make([phrase.text for phrase in phrases]).T
    scores = (cosines - mean) / spread
    for row, column in zip(*np.nonzero(scores >= least), strict=True):
        yield (held[row], int(column)), Reason(evidence, phrases[column].text, float(scores[row, column]), float(cosines[row, column]))


def threshold(count: int, chance: float = CHANCE) -> float:
    """Standard deviations that one of `count` unrelated LoRAs reaches with this chance, at least 2."""
    return max(2.0, NormalDist().inv_cdf((1 - chance) ** (1 / max(1, count))))


def _worth(reasons: Sequence[Reason]) -> float:
    """Several kinds of evidence for the same count more than one: the strongest, and the others by a tenth."""
    scores = sorted((reason.score for reason in reasons), reverse=True)
    return scores[0] + 0.1 * sum(scores[1:])


def _chosen(prompt: str, phrases: Sequence[Phrase], candidates: Sequence[Candidate], ranked: Sequence[tuple[int, int, tuple[Reason, ...]]],
            most: int, alike: float) -> list[Suggestion]:  # fmt: skip
    """Down the ranking: none whose phrase is served, or that does what one that was taken does."""
    taken, spoken = [], Words(prompt)
    served: set[str] = set()
    for who, which, reasons in ranked:
        candidate, phrase = candidates[who], phrases[which] if which >= 0 else None
        words = set(content(phrase.text if phrase else reasons[0].words))
        if len(taken) == most:
            break
        if words & served or any(candidate.id == other.candidate.id or likeness(candidate, other.candidate) >= alike for other in taken):
            continue
        served |= words
        everywhere = candidate.category in EVERYWHERE if candidate.category else bool(phrase and phrase.everywhere)
        has_trigger = not candidate.triggers or any(spoken.say(words) for words in candidate.triggers)
        taken.append(Suggestion(candidate, phrase.text if phrase else reasons[0].words, everywhere, reasons, "" if has_trigger else candidate.triggers[0],
                                1.0 if candidate.weight is None else candidate.weight))  # fmt: skip
    return taken


def likeness(first: Candidate, other: Candidate) -> float:
    """The largest cosine that any kind of vector has for two LoRAs; -1 where they share none."""
    shared = first.vectors.keys() & other.vectors.keys()
    return max((float(first.vectors[name] @ other.vectors[name]) for name in shared), default=-1.0)
