"""Trigger words in a prompt, the words that each LoRA is bound to, and the prompts built from them: the base's and each concept's.

A concept is a LoRA with words of its own in the prompt; a style or a place binds to nothing and is everywhere. The base reads
the prompt without trigger words; each concept reads it with its own trigger words in its own place, and with no others.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from composition import prompt_syntax
from composition.prompt_weights import Prompt, Text, marked, text_of
from composition.refusal import Refused
from composition.request import Lora, Receipt, Request

_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")  # Thai to Korean, as one word may join the next
_NO_LETTER_BEFORE, _NO_LETTER_AFTER = r"(?<!\w)(?<![\u0300-\u036f])", r"(?![\w\u0300-\u036f])"  # re does not count combining accents as letters

Span = tuple[int, int]  # of characters in a prompt, end excluded
EVERYWHERE = ("style", "place")  # categories that bind to nothing unless a LoRA names words or a region
STOP = frozenset("a an the of and or in on at with to by for from as is are its their his her this that".split())


@dataclass(frozen=True)
class Scene:
    """A prompt split by concept.

    concepts: names of the LoRAs that are bound, in the order of the request; everywhere: those that are not.
    prompts: the base's first, then one for each concept, with the weights that the request's has. spans[c][p]: where concept c stands in the
    text of prompt p.
    """

    concepts: tuple[str, ...]
    everywhere: tuple[str, ...]
    prompts: tuple[Text, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def texts(self) -> list[str]:
        return list(map(text_of, self.prompts))


def says(prompt: str, words: str) -> bool:
    """True when the prompt has these words, whole, in order and in any case: "bowl" does not say "owl"."""
    return bool(standing(prompt, words))


def lacks(prompt: str, triggers: Sequence[str]) -> bool:
    """True when there are trigger words and the prompt says none of them."""
    return bool(triggers) and not any(says(prompt, words) for words in triggers)


def with_triggers(request: Request, inspect: Callable[[str], Receipt]) -> tuple[Request, list[str]]:
    """The request with the first trigger word of every LoRA that has none in the prompt, and the words put in.

    inspect: source of a LoRA to its receipt.
    """
    added: list[str] = []
    for lora in request.loras:
        triggers = lora.triggers or inspect(lora.source).triggers
        if lacks(", ".join([prompt_syntax.words(request), *added]), triggers):
            added.append(triggers[0])
    texts = [prompt_syntax.verbatim(request, words) for words in added]
    return replace(request, prompt=", ".join([request.prompt, *texts] if request.prompt else texts)), added


def scene(
    whole: Text, loras: Mapping[str, Lora], categories: Mapping[str, str], triggers: Mapping[str, Sequence[str]]
) -> Scene:
    """Split a prompt by its LoRAs' `binds`, else their trigger words.

    Words that are put in another's place have the weight of the last of them. Raises Refused when the words of a LoRA are not in the prompt, are there twice, or belong to another LoRA too.
    """
    bound: dict[str, Span] = {}
    prompt = text_of(whole)
    for name, lora in loras.items():
        if (span := _span(prompt, name, lora, categories.get(name, ""), triggers.get(name, ()))) is not None:
            bound[name] = span
    order = sorted(bound, key=lambda name: bound[name])
    for first, second in pairwise(order):
        if bound[second][0] < bound[first][1]:
            words = (prompt[slice(*bound[name])] for name in (first, second))
            raise Refused(f"{first} and {second} are bound to words that overlap ({', '.join(map(repr, words))}): bind each to words of its own")
    plain = {name: _without(prompt[slice(*bound[name])], triggers.get(name, ())) for name in bound}
    own = {name: _with(prompt[slice(*bound[name])], triggers.get(name, ())) for name in bound}
    prompts = [_written(whole, bound, order, plain)]
    prompts += [_written(whole, bound, order, plain | {name: own[name]}) for name in bound]
    return Scene(
        tuple(bound), tuple(name for name in loras if name not in bound), tuple(text for text, _ in prompts),
        tuple(tuple(spans[name] for _, spans in prompts) for name in bound))


def alone(prompt: str, loras: Mapping[str, Lora], triggers: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """For each LoRA the text of the prompt without the words of the others: what they are bound to, else all of their trigger words."""
    words = {name: [lora.binds] if lora.binds is not None else list(triggers.get(name, ())) for name, lora in loras.items()}
    return {name: _without(prompt, [each for other, theirs in words.items() if other != name for each in theirs]) for name in loras}


def tokens(
    prompt: str, span: Span, offsets: Sequence[Span], *, cut: bool = False
) -> tuple[int, ...]:
    """The positions of the tokens of these words, articles and the like left out (unless there is nothing else).

    offsets: of each token's characters in the prompt, (0, 0) for one that stands for none. cut: the tokenizer truncated the
    prompt. Raises Refused when these words are in the part that was cut off.
    """
    words = [match.span() for match in re.finditer(r"\w[\w'’-]*", prompt[slice(*span)])]
    words = [(a + span[0], b + span[0]) for a, b in words] or [span]
    content = [word for word in words if prompt[slice(*word)].lower() not in STOP] or words
    end = max(b for _, b in offsets)
    if cut and content[-1][1] > end:
        raise Refused(f"{prompt[slice(*span)]!r} is in the end of the prompt, which the model does not see: move it closer to the beginning")
    return tuple(index for index, (a, b) in enumerate(offsets) if a < b and any(a < y and x < b for x, y in content))


def _span(prompt: str, name: str, lora: Lora, category: str, triggers: Sequence[str]) -> Span | None:
    if lora.binds is not None:
        places = standing(prompt, lora.binds)
        if not places:
            raise Refused(f"LoRA {name} is bound to {lora.binds!r}, which the prompt does not contain: write the words as they stand in it")
        return _only(places, name, lora.binds)
    if category in EVERYWHERE and lora.region is None:
        return None
    for words in triggers:
        if places := standing(prompt, words):
            return _only(places, name, words)
    if lora.region is not None:
        return None
    missing = f"the prompt has none of LoRA {name}'s trigger words ({', '.join(triggers)})" if triggers else f"the file of LoRA {name} names no trigger words"
    raise Refused(f"{missing}: {'add one, or ' * bool(triggers)}name the words it belongs to with binds, as in "
                  f'{{"source": "{name}", "binds": "the fox"}}, or set category "style" to apply it everywhere')


def standing(prompt: str, words: str) -> list[Span]:
    """Where these words stand in the prompt: whole, in order, in any case, with any spaces between them.

    In scripts that are written without spaces between words, anywhere.
    """
    spellings = dict.fromkeys(unicodedata.normalize(form, words) for form in ("NFC", "NFD"))
    patterns = []
    for spelling in spellings:
        if parts := spelling.split():
            before = "" if _UNSPACED.match(parts[0][0]) else _NO_LETTER_BEFORE
            after = "" if _UNSPACED.match(parts[-1][-1]) else _NO_LETTER_AFTER
            patterns.append(before + r"\s+".join(map(re.escape, parts)) + after)
    return [match.span() for match in re.finditer("|".join(patterns), prompt, re.IGNORECASE)] if patterns else []


def _only(places: Sequence[Span], name: str, words: str) -> Span:
    if len(places) > 1:
        raise Refused(f"the prompt says {words!r} {len(places)} times, and LoRA {name} can belong to only one of them: name it with "
                      "binds, in more words than these")
    return places[0]


def _content(text: str) -> list[str]:
    return [word for word in re.findall(r"\w[\w'’-]*", text) if word.lower() not in STOP]


def _without(phrase: str, triggers: Sequence[str]) -> str:
    """The phrase without trigger words; as it is when no word with a meaning would be left."""
    bare = phrase
    for words in triggers:
        for a, b in reversed(standing(bare, words)):
            bare = bare[:a] + bare[b:]
    bare = re.sub(r"\s+", " ", bare).strip()
    return bare if _content(bare) else phrase


def _with(phrase: str, triggers: Sequence[str]) -> str:
    """The phrase with its first trigger words, when it has none: after its article, and in place of words that they repeat."""
    if not triggers or any(standing(phrase, words) for words in triggers):
        return phrase
    article = re.match(r"\s*(?:(?:a|an|the)\s+)?", phrase, re.IGNORECASE)
    head, rest = phrase[: article.end()] if article else "", phrase[article.end() :] if article else phrase
    trigger_words = {word.lower() for word in _content(triggers[0])}
    if all(word.lower() in trigger_words for word in _content(rest)):
        return head + triggers[0]
    return f"{head}{triggers[0]} {rest}"


def _written(whole: Text, bound: Mapping[str, Span], order: Sequence[str], words: Mapping[str, str]) -> tuple[Text, dict[str, Span]]:
    """The prompt with these words in place of the bound spans, and the spans where they now stand."""
    prompt, marks = text_of(whole), whole.marks() if isinstance(whole, Prompt) else []
    text, at, spans, carried = "", 0, {}, []
    for name in order:
        begin, end = bound[name]
        text += prompt[at:begin]
        spans[name] = (len(text), len(text) + len(words[name]))
        if marks:
            same = words[name] == prompt[begin:end]
            carried += [*marks[at:begin], *(marks[begin:end] if same else [(marks[end - 1][0], False)] * len(words[name]))]
        text, at = text + words[name], end
    text += prompt[at:]
    return (marked(text, [*carried, *marks[at:]]) if isinstance(whole, Prompt) else text), spans
