"""What people write in a prompt besides words: <lora:name:weight> tags, weights, BREAK; and schedules, choices, AND.

A tag becomes a LoRA and leaves the prompt; weights and BREAK are read (`prompt_weights`), in requests from schema 2 on. The rest has no meaning
here and is only recognised, so that it can be reported. The forms are A1111's (its prompt parser and extra networks) and its relatives'. Every
function takes time linear in the prompt.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from composition import prompt_weights
from composition.prompt_weights import Text
from composition.refusal import Refused, explain
from composition.request import MAX_LORAS, SCHEMA_VERSION, Lora, Request

TAGGED = "loras from the prompt"  # the note on tags that became LoRAs
UNREAD = "prompt syntax"  # the note on what is read as plain words
MAX_SHOWN = 60  # letters of a piece that is quoted
MOST_SHOWN = 8

_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)
_OPEN_TAG = re.compile(r"<(?:lora|lyco):", re.IGNORECASE)
_OTHER_TAG = re.compile(r"<(?:hypernet|segment|object|region|random|wildcard|alternate|fromto|embed|repeat|preset)[:\[][^<>]*>", re.IGNORECASE)
_WORD = re.compile(r"(?<!\w)(?:BREAK|AND|ADDBASE|ADDCOL|ADDROW)(?!\w)|(?<!\w)embedding:[\w.-]+|__[\w/*-]{1,100}__")
_READ = re.compile(r"BREAK|embedding:.*")  # of these what a request of today means something by
WEIGHTED = 2  # the schema from which prompts have weights, BREAK and no end; of older ones a picture is made again as it was
_CHOICE = re.compile(r"\{[^{}|]{0,200}\|[^{}]{0,200}\}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})%?")


class Tag(NamedTuple):
    """A tag as it stands in the prompt, the LoRA that it names, and what of it could not be read."""

    text: str
    lora: Lora
    unread: tuple[str, ...]


def untagged(prompt: str) -> tuple[str, tuple[Tag, ...]]:
    """The prompt without its tags and the space before each, and the tags. A prompt without tags is returned as it is.

    Raises pydantic's ValidationError for a weight out of range.
    """
    tags, kept, end = [], [], 0
    for match in _TAG.finditer(prompt):
        kept.append(prompt[end : match.start()].rstrip())
        end = match.end()
        if match[1].split(":")[0].strip():
            tags.append(_tag(match[0], match[1]))
        else:
            kept[-1] += match[0]  # names nothing: `settled` refuses it
    return ("".join([*kept, prompt[end:]]).strip(), tuple(tags)) if tags else (prompt, ())


def _tag(text: str, inside: str) -> Tag:
    """<lora:name:w>, <lora:name:text:denoiser>, or with te= and unet= by name; the denoiser's defaults to the text's."""
    name, *arguments = inside.split(":")
    text_weight, denoiser, unread = 1.0, None, []
    for position, argument in enumerate(arguments):
        key, _, value = argument.strip().rpartition("=")
        try:
            if key == "te" or (not key and position == 0):
                text_weight = float(value)
            elif key == "unet" or (not key and position == 1):
                denoiser = float(value)
            else:
                unread.append(argument)
        except ValueError:
            unread.append(argument)
    weight = text_weight if denoiser is None else denoiser
    return Tag(text, Lora(name.strip(), weight=weight, text_weight=None if text_weight == weight else text_weight), tuple(unread))


def written(name: str, lora: Lora) -> str:
    """The tag of a LoRA; two weights where the text encoder's differs, which stands first."""
    text = lora.weight if lora.text_weight is None else lora.text_weight
    weights = f"{lora.weight:g}" if text == lora.weight else f"{text:g}:{lora.weight:g}"
    return f"<lora:{name}:{weights}>"


def settled(request: Request, find: Callable[[str], Path]) -> tuple[Request, dict[str, float]]:
    """The request with the LoRAs of its prompt's tags among its own and the tags gone, and those LoRAs' weights by name.

    find: a LoRA's source to its file, raising Refused for what is not there. Raises Refused for a tag that cannot be read or
    resolved, for one in the negative prompt, and for a LoRA that is named twice, which would be applied twice.
    """
    if _OPEN_TAG.search(request.negative):
        raise Refused("the negative prompt has a <lora:...> tag, which no tool applies: name the LoRA in the prompt, with a negative "
                      "weight if it is to be subtracted")
    if not _OPEN_TAG.search(request.prompt):
        return request, {}
    try:
        prompt, tags = untagged(request.prompt)
    except ValidationError as error:
        raise Refused(f"a <lora:...> tag of the prompt cannot be used: {explain(error)}") from None
    if left := _OPEN_TAG.search(prompt):
        raise Refused(f"the prompt has {prompt[left.start() : left.start() + MAX_SHOWN]!r}, which is no whole tag: write <lora:NAME:WEIGHT>, "
                      "as in <lora:owl:0.8>")
    paths = {find(lora.source).resolve() for lora in request.loras}
    for tag in tags:
        if tag.unread:
            raise Refused(f"{tag.text[:200]!r} in the prompt: {tag.unread[0][:MAX_SHOWN]!r} is not read; write <lora:NAME:WEIGHT>, or "
                          "<lora:NAME:TEXT:DENOISER> for two weights")
        try:
            path = find(tag.lora.source).resolve()
        except Refused as error:
            raise Refused(f"{tag.text[:200]} in the prompt: {error}") from None
        if path in paths:
            raise Refused(f"LoRA {tag.lora.name} is named twice, by {tag.text[:200]} in the prompt and before: it would be applied twice; "
                          "leave one out")
        paths.add(path)
    if len(request.loras) + len(tags) > MAX_LORAS:
        raise Refused(f"the prompt's tags make it {len(request.loras) + len(tags)} LoRAs; a request has at most {MAX_LORAS}")
    with_tags = replace(request, prompt=prompt, loras=(*request.loras, *(tag.lora for tag in tags)))
    return with_tags, dict(list(with_tags.weights.items())[len(request.loras):])


def prompts_of(request: Request) -> tuple[Text, Text]:
    """The request's prompt and negative prompt as they are encoded. Raises Refused for a weight out of range."""
    both = request.prompt, request.negative
    return both if request.schema_version < WEIGHTED else (prompt_weights.read(both[0]), prompt_weights.read(both[1]))


def words(request: Request) -> str:
    """The words of the request's prompt, without the syntax around them."""
    return request.prompt if request.schema_version < WEIGHTED else prompt_weights.plain(request.prompt)


def verbatim(request: Request, text: str) -> str:
    """A text as the request's prompts have to write it so that its brackets mean nothing."""
    return text if request.schema_version < WEIGHTED else prompt_weights.escaped(text)


def today(request: Request) -> Request:
    """The request in today's schema, for prompts that are to be edited: the brackets of an older one keep meaning nothing."""
    if request.schema_version >= WEIGHTED:
        return request
    prompt, negative = (prompt_weights.escaped(text) for text in (request.prompt, request.negative))
    return replace(request, prompt=prompt, negative=negative, schema_version=SCHEMA_VERSION)


def unread(request: Request) -> list[str]:
    """The pieces of its prompts that other tools read as instructions and Medley as plain words, each once, shortened."""
    return unread_in(request.prompt, request.negative, schema=request.schema_version)


def unread_in(*prompts: str, schema: int = SCHEMA_VERSION) -> list[str]:
    """The same of prompts of a request of this schema."""
    pieces: dict[str, None] = {}
    read = schema >= WEIGHTED
    for prompt in prompts:
        spans = [*(_choices(prompt) if read else _bracketed(prompt)), *(match.span() for match in _OTHER_TAG.finditer(prompt)),
                 *(match.span() for match in _WORD.finditer(prompt) if not (read and _READ.fullmatch(match[0])))]
        for start, end in sorted(spans):
            piece = prompt[start:end]
            pieces[piece if len(piece) <= MAX_SHOWN else f"{piece[:MAX_SHOWN]}..."] = None
    return list(pieces)[:MOST_SHOWN]


def _choices(prompt: str) -> list[tuple[int, int]]:
    """[a:b:0.5], [a|b] and {a|b}, which are not read beside weights."""
    return [*prompt_weights.schedules(prompt), *(match.span() for match in _CHOICE.finditer(prompt))]


def _bracketed(prompt: str) -> list[tuple[int, int]]:
    """(word:1.2), ((word)), [word], [a:b:0.5], [a|b], {a|b}: where they begin and end, outermost only.

    One pass with a stack. A single pair of round brackets without a number is left alone: people write those too.
    """
    spans: list[tuple[int, int]] = []
    stack: list[tuple[str, int, bool]] = []  # bracket, where, whether what it holds is an instruction already
    closing = {")": "(", "]": "[", "}": "{"}
    colon = bar = -1  # where the last ":" and "|" stood
    previous = ""
    for at, letter in enumerate(prompt):
        if previous == "\\":  # \( is a bracket that is only drawn
            previous = ""
            continue
        previous = letter
        if letter == ":":
            colon = at
        elif letter == "|":
            bar = at
        elif letter in "([{":
            stack.append((letter, at, False))
        elif letter in closing and stack and stack[-1][0] == closing[letter]:
            kind, start, holds = stack.pop()
            weighted = colon > start and bool(_NUMBER.fullmatch(prompt[colon + 1 : at].strip())) if at - colon < 50 else False
            doubled = kind == "(" and prompt[start + 1 : start + 2] == "(" and at and prompt[at - 1] == ")"
            choice = kind != "(" and bar > start
            if holds or weighted or doubled or choice or kind == "[":
                if stack:
                    stack[-1] = (*stack[-1][:2], True)
                while spans and spans[-1][0] > start:
                    spans.pop()
                spans.append((start, at + 1))
    return spans


def sentence(pieces: Sequence[str]) -> str:
    """What `unread` found, for people."""
    return f"read as plain words: {', '.join(pieces)} (other tools take them for instructions)"
