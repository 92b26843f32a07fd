"""Weights of words in a prompt as A1111 writes them, (word:1.2), (word), [word], and BREAK: read into the text and what each letter weighs.

(word) weighs 1.1 and [word] 1/1.1; nested, they multiply; \\( and \\[ are plain brackets. What does not close, and [a:b:0.5], [a|b] and (),
is plain text. Every function takes time linear in the prompt. What a weight does is `backbones.chunks`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from composition.refusal import Refused

MORE = 1.1  # what a pair of round brackets multiplies by, and a pair of square ones divides by
HEAVIEST = 10.0  # whether it is added or taken away
MAX_SHOWN = 60  # letters of a piece that is quoted

_TOKEN = re.compile(r"\\[\\()\[\]]|[(\[]|:\s*([+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20}))\s*\)|[)\]]|[^\\()\[\]:]+|[:\\]")
_SCHEDULE = re.compile(r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})")
_BREAK = re.compile(r"(?<!\w)BREAK(?!\w)")
_SYNTAX = re.compile(r"[()\[\]]|(?<!\w)BREAK(?!\w)")
_BRACKET = re.compile(r"[()\[\]]")


class Word(NamedTuple):
    """A textual inversion in a prompt: where its word stands, the hash of its vectors, and how many there are."""

    start: int
    end: int
    key: str
    count: int


class Prompt(NamedTuple):
    """A prompt as it is encoded: whole, however long it is.

    text: without syntax. weights: (start, end, weight) of its letters where that is not 1, in order. breaks: letters before which a new
    chunk begins. words: its textual inversions, in order.
    """

    text: str
    weights: tuple[tuple[int, int, float], ...] = ()
    breaks: tuple[int, ...] = ()
    words: tuple[Word, ...] = ()

    def marks(self) -> list[tuple[float, bool]]:
        """Of each letter: its weight, and whether a chunk begins with it. `marked` is the inverse."""
        weights = [1.0] * len(self.text)
        for start, end, weight in self.weights:
            weights[start:end] = [weight] * (end - start)
        breaks = set(self.breaks)
        return [(weight, at in breaks) for at, weight in enumerate(weights)]


Text = str | Prompt  # a str is encoded as the stock pipelines do: literally, and as far as the encoder sees


def text_of(prompt: Text) -> str:
    return prompt.text if isinstance(prompt, Prompt) else prompt


def marked(text: str, marks: Sequence[tuple[float, bool]]) -> Prompt:
    """The prompt of this text whose letters have these weights and breaks."""
    weights, at = [], 0
    for weight, letters in groupby(weight for weight, _ in marks):
        start, at = at, at + len(list(letters))
        if weight != 1.0:
            weights.append((start, at, weight))
    return Prompt(text, tuple(weights), tuple(at for at, (_, begins) in enumerate(marks) if begins and at > 0))


def read(prompt: str) -> Prompt:
    """The prompt's text, weights and breaks; one without any syntax is its own text. Raises Refused for a weight out of range."""
    if not _SYNTAX.search(prompt):
        return Prompt(prompt)
    text: list[str] = []
    marks: list[tuple[float, bool]] = []
    begins = False
    for piece, weight in _weighted(prompt):
        if not -HEAVIEST <= weight <= HEAVIEST:
            raise Refused(f"the prompt gives {piece.strip()[:MAX_SHOWN]!r} the weight {weight:.4g}; weights from {-HEAVIEST:g} to {HEAVIEST:g} are read")
        parts = _BREAK.split(piece)
        for index, part in enumerate(parts):
            part = part.lstrip() if index else part
            part = part.rstrip() if index < len(parts) - 1 else part
            if index and marks and not begins:
                begins = True
                text.append(" ")
                marks.append((1.0, False))
            if part:
                text.append(part)
                marks += [(weight, begins), *[(weight, False)] * (len(part) - 1)]
                begins = False
    return marked("".join(text), marks)


def plain(prompt: str) -> str:
    """The text of a prompt, without its syntax, whatever its weights are."""
    return "".join(piece for piece, _ in _weighted(prompt)) if _BRACKET.search(prompt) else prompt


def escaped(text: str) -> str:
    """The text as a prompt in which brackets mean nothing."""
    return re.sub(r"(?<!\\)(\\*)([()\[\]])", r"\1\1\\\2", text)


def schedules(prompt: str) -> list[tuple[int, int]]:
    """Where [a:b:0.5] and [a|b] begin and end, which are read as plain text."""
    return [(tokens[0].start(), tokens[1].end()) for tokens in _pairs(prompt)[1]]


def _weighted(prompt: str) -> Iterator[tuple[str, float]]:
    """The pieces of plain text, with the weight that the brackets around each make."""
    factors = {}
    for opening, closing, factor in _pairs(prompt)[0]:
        factors[opening.start()], factors[closing.start()] = factor, None
    stack = [1.0]
    for token in _TOKEN.finditer(prompt):
        piece, at = token[0], token.start()
        if at in factors:
            if (factor := factors[at]) is None:
                stack.pop()
            else:
                stack.append(stack[-1] * factor)
        else:
            yield piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, stack[-1]


def _pairs(prompt: str) -> tuple[list[tuple[re.Match[str], re.Match[str], float]], list[tuple[re.Match[str], re.Match[str]]]]:
    """The brackets that weigh, each pair with its factor; and those of [a:b:0.5] and [a|b]."""
    pairs, others = [], []
    stack: list[re.Match[str]] = []
    waiting = {"(": 0, "[": 0}
    colon = bar = -1
    for token in _TOKEN.finditer(prompt):
        piece, at = token[0], token.start()
        if "|" in piece:
            bar = at + piece.rindex("|")
        if piece in waiting:
            stack.append(token)
            waiting[piece] += 1
        elif piece[-1] in ")]" and piece[0] != "\\":
            kind = "(" if piece[-1] == ")" else "["
            while waiting[kind] and stack[-1][0] != kind:  # one that does not close inside this pair
                waiting[stack.pop()[0]] -= 1
            if waiting[kind]:
                opening = stack.pop()
                waiting[kind] -= 1
                if kind == "[" and (bar > opening.start() or colon > opening.start() and _SCHEDULE.fullmatch(prompt[colon + 1 : at][:50].strip())):
                    others.append((opening, token))
                elif opening.end() < at:
                    pairs.append((opening, token, float(token[1]) if token[1] else MORE if kind == "(" else 1 / MORE))
        if piece[0] == ":":
            colon = at
    return pairs, others
