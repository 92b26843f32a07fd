"""Words of a LoRA's card and of a query: one spelling for both, quoted phrases, and words that are close to a mistyped one.

Both engines of the index search the tokens of this file, so that they agree on what a word is. File names are the text here:
"GhibliStyle_v2" is searched by "ghibli", "Pokémon" by "pokemon", "dragons" by "dragon", and Chinese and Japanese, which have no
spaces, by pairs of signs.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from composition.refusal import Refused

MAX_QUERY = 10_000  # letters
MAX_TOKEN = 40  # letters; longer ones (keys, base64) are cut
MAX_CLOSE = 8  # words that stand in for an unknown one
PREFIX = 3  # letters from which an unknown word is taken as the beginning of others
TYPO = 5  # letters from which an unknown word may have one typo; shorter words have too many neighbours (lake, cake, fake)
STOP_WORDS = frozenset(
    "a an and are as at be by for from has have in into is it its of on or over s that the this to under was were with".split()
)
_RUN = re.compile(r"[^\W_]+")
_SEAM = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")
_UNSPACED = re.compile("([\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+)")  # Thai, Lao, Kana, Han
_ACCENT = re.compile("[\u0300-\u036f]")
_PHRASE = re.compile('["“”]([^"“”]*)["“”]')
_ENDED = re.compile(r"(?:ss|sh|ch|x|zz)es$")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def clean(text: str) -> str:
    """The text without halves of letters (lone surrogates, as undecodable file names have), which no table of the index can hold."""
    return text.encode("utf-8", "replace").decode()


def fold(text: str) -> str:
    """The text in one spelling, for literal comparison: composed, without case, any run of white space one space."""
    return " ".join(unicodedata.normalize("NFKC", clean(text)).casefold().split())


def tokens(text: str) -> list[str]:
    """The searchable words of a text, in order, repetitions and all; a name written as one word gives its parts too."""
    words = []
    for run in _RUN.findall(unicodedata.normalize("NFKC", clean(text))):
        parts = _SEAM.sub(" ", run).split()
        for part in [run, *parts] if len(parts) > 1 else parts:
            words += _spelled(part)
    return words


def _spelled(part: str) -> list[str]:
    plain = unicodedata.normalize("NFC", _ACCENT.sub("", unicodedata.normalize("NFKD", part.casefold())))
    words = []
    for index, piece in enumerate(_UNSPACED.split(plain)):
        if index % 2:
            words += [*piece, *(piece[at : at + 2] for at in range(len(piece) - 1))]
        elif piece:
            words.append(_singular(piece[:MAX_TOKEN]))
    return words


def _singular(word: str) -> str:
    """An English plural's singular, as far as endings tell; a wrong guess is harmless, being the same for cards and queries."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if _ENDED.search(word) else word[:-1]


@dataclass(frozen=True)
class Query:
    """What a text asks for. phrases: folded, each must occur literally. terms: distinct tokens, any of which may occur."""

    phrases: tuple[str, ...]
    terms: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.phrases or self.terms)


def parse(text: str) -> Query:
    """The query in a text: phrases in double quotes, the rest words. A quote that is not closed (yet) is no quote.

    Words like "the" count only where there are no others, or inside a phrase. Raises Refused over MAX_QUERY letters.
    """
    if len(text) > MAX_QUERY:
        raise Refused(f"The query has {len(text):,} letters: at most {MAX_QUERY:,} are searched for")
    phrases = [phrase for quoted in _PHRASE.findall(text) if (phrase := fold(quoted))]
    rest = tokens(_PHRASE.sub(" ", text))
    inside = [word for phrase in _PHRASE.findall(text) for word in tokens(phrase)]
    telling = [word for word in rest if word not in STOP_WORDS]
    return Query(tuple(dict.fromkeys(phrases)), tuple(dict.fromkeys(inside + (telling if telling or inside else rest))))


class Vocabulary:
    """The distinct tokens of an index, sorted, with the number of rows that each is in."""

    def __init__(self, words: Sequence[str], rows: Sequence[int]) -> None:
        self.words, self.rows = list(words), rows
        self.places = {word: place for place, word in enumerate(self.words)}

    def close(self, terms: Sequence[str]) -> tuple[str, ...]:
        """The terms, each unknown one replaced by the known words that it begins or that are one typo away, commonest first."""
        words: dict[str, None] = {}
        for term in terms:
            words.update(dict.fromkeys([term] if term in self.places else self._stand_ins(term)))
        return tuple(words)

    def _stand_ins(self, term: str) -> list[str]:
        near: set[str] = set()
        if len(term) >= PREFIX:
            start = bisect_left(self.words, term)
            stop = bisect_left(self.words, term + "\U0010ffff", start)
            near.update(self.words[start:stop])
        if len(term) >= TYPO:
            near.update(self.places.keys() & _one_typo(term))
        return sorted(near, key=lambda word: (-self.rows[self.places[word]], word))[:MAX_CLOSE]


def _one_typo(word: str) -> set[str]:
    """Every word that one missing, added, changed or swapped letter away from this one."""
    cuts = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    missing = {head + tail[1:] for head, tail in cuts if tail}
    swapped = {head + tail[1] + tail[0] + tail[2:] for head, tail in cuts if len(tail) > 1}
    changed = {head + letter + tail[1:] for head, tail in cuts if tail for letter in _LETTERS}
    added = {head + letter + tail for head, tail in cuts for letter in _LETTERS}
    return missing | swapped | changed | added
