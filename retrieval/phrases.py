"""A prompt split into the phrases that LoRAs are searched for, each by itself: what is seen, how it looks, where it is."""

import re
from typing import NamedTuple

MOST = 16  # phrases of a prompt that are searched for
LONGEST = 8  # words of a phrase; more are no name of anything

_BREAK = re.compile(
    r"[,.;:!?|/()\[\]{}\n]+|--+"
    r"|\b(?:and|with|without|in|on|at|by|of|from|to|into|onto|over|under|below|above|before|behind|beside|besides|between|near|next|through|among"
    r"|around|against|inside|outside|for|as|that|which|who|where|while|is|are|was|were|wearing|wears|holding|holds|riding|rides|having|has|have"
    r"|sitting|standing|lying|made|painted|drawn|rendered|featuring|showing)\b",
    re.IGNORECASE)
_EMPTY = frozenset("a an the some this that these those its his her their my our your one two three very really".split())
# Words that say that something is a picture, or how good, and nothing of what is seen.
_GENERIC = frozenset(
    "picture pictures photo photos photograph photography image images drawing illustration artwork art render rendering scene view shot style "
    "masterpiece quality best high highly detailed intricate beautiful amazing stunning professional trending award winning 4k 8k hd uhd resolution".split())


class Phrase(NamedTuple):
    """text: as it stands in the prompt, without articles at its beginning. words: those of it that say something. whole: not a part of another."""

    text: str
    words: tuple[str, ...]
    whole: bool = True


def split(prompt: str) -> list[Phrase]:
    """The phrases in their order, each once; behind one of several words those words by themselves, since a style or a place is often one of
    them ("a neon city"). Empty for a prompt that names nothing."""
    found: dict[str, Phrase] = {}
    for piece in _BREAK.split(prompt):
        words = re.findall(r"\w[\w'’-]*", piece)
        while words and words[0].lower() in _EMPTY:
            words = words[1:]
        said = tuple(word for word in words if word.lower() not in _EMPTY | _GENERIC and not word.isdigit())
        if not said or len(words) > LONGEST:
            found |= {word.lower(): Phrase(word, (word,), False) for word in said if word.lower() not in found}
            continue
        text = " ".join(words if len(said) > 1 else said)
        found.setdefault(text.lower(), Phrase(text, said))
        for word in said if len(said) > 1 else ():
            found.setdefault(word.lower(), Phrase(word, (word,), False))
    return list(found.values())[:MOST]


class Words:
    """The words of a prompt, read once to be asked often."""

    def __init__(self, prompt: str) -> None:
        self._words = _words(prompt)
        self._places: dict[str, list[int]] = {}
        for place, word in enumerate(self._words):
            self._places.setdefault(word, []).append(place)

    def say(self, text: str) -> bool:
        """Whether they have these, whole, beside each other and in order, in any case: "bowl" does not say "owl"."""
        wanted = _words(text)
        return bool(wanted) and any(self._words[place : place + len(wanted)] == wanted for place in self._places.get(wanted[0], ()))


def content(text: str) -> list[str]:
    """The words of a text that say something, in lower case; all of them where none does."""
    return [word.lower() for phrase in split(text) for word in phrase.words] or _words(text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w[\w'’-]*|[^\w\s]", text.lower())
