"""A prompt split into the phrases that LoRAs are searched for, each by itself: what is seen, how it looks, where it is."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST = 16  # phrases of a prompt that are searched for
LEAST = 3  # letters of a word that a file's name is known by
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


# Words of files' names that say what a file is, and nothing of what it does.
_OF_FILES = frozenset("lora loras locon loha lokr lycoris dora safetensors checkpoint epoch epochs step steps rank dim final last".split())
_AROUND = frozenset("in at on under near inside outside through by".split())  # what a place is named with
_LOOK = re.compile(r"\b(?:style|styled|aesthetic|look|lighting|light|colours?|colors?|palette|background)\b", re.IGNORECASE)


class Phrase(NamedTuple):
    """text: as it stands in the prompt, without articles at its beginning. words: those of it that say something. everywhere: it says where the
    picture is or how it looks, and not what is in it, as far as the words around it tell. whole: not a part of another."""

    text: str
    words: tuple[str, ...]
    everywhere: bool = False
    whole: bool = True


def split(prompt: str) -> list[Phrase]:
    """The phrases in their order, each once; behind one of several words those words by themselves, since a style or a place is often one of
    them ("a neon city"). Empty for a prompt that names nothing."""
    phrases: dict[str, Phrase] = {}
    for before, piece in _pieces(prompt):
        words = re.findall(r"\w[\w'’-]*", piece)
        while words and words[0].lower() in _EMPTY:
            words = words[1:]
        content_words = tuple(word for word in words if word.lower() not in _EMPTY | _GENERIC and not word.isdigit())
        everywhere = before in _AROUND or bool(_LOOK.search(piece))
        if content_words and len(words) <= LONGEST:
            text = " ".join(words if len(content_words) > 1 else content_words)
            phrases.setdefault(text.lower(), Phrase(text, content_words, everywhere))
        for word in content_words if len(content_words) > 1 else ():
            phrases.setdefault(word.lower(), Phrase(word, (word,), everywhere, False))
    return list(phrases.values())[:MOST]


def _pieces(prompt: str) -> Iterator[tuple[str, str]]:
    """What stands between two breaks, with the break before it in lower case."""
    before, start = "", 0
    for end in _BREAK.finditer(prompt):
        yield before, prompt[start : end.start()]
        before, start = end[0].lower(), end.end()
    yield before, prompt[start:]


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


def in_words_of(names: Sequence[str], text: str) -> str:
    """A phrase as a judge of few words knows it: the shortest of its names that says all of the phrase ("neon" is "neon lights"); else the phrase."""
    wanted = set(content(text))
    return min((name for name in names if wanted and wanted <= set(content(name))), key=lambda name: (len(name), name), default=text)


def telling(name: str) -> tuple[str, ...]:
    """A file's name as words, "top_hat-v2" as "top hat"; none where it tells nothing: "p001", "lora-000008", and words like "the" or "style"."""
    text = " ".join(word for word in name.replace("_", " ").replace("-", " ").split() if not _version(word) and word.lower() not in _OF_FILES)
    return (text,) if any(sum(map(str.isalpha, word)) >= LEAST or not word.isascii() for phrase in split(text) for word in phrase.words) else ()


def _version(word: str) -> bool:
    bare = word.lower().lstrip("v").replace(".", "")
    return not bare or bare.isdigit()


def _words(text: str) -> list[str]:
    return re.findall(r"\w[\w'’-]*|[^\w\s]", text.lower())
