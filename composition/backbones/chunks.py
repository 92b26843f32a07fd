"""Prompts that a CLIP encoder does not take as they are: longer than its 75 tokens, with weights, or with textual inversions.

A long prompt is read in chunks of 75 tokens that lie one after the other on the text axis, as A1111 and ComfyUI do; one chunk is split from
the next after a comma among its last 20 tokens, else between words. A weight w moves a token from what the empty prompt has in its place:
e + w (z - e), ComfyUI's rule and compel's, which unlike A1111's is defined for every encoder (A1111 scales by w and brings the mean back, and the
mean may be 0). The pooled value is the first chunk's, without weights, as both do.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composition.prompt_weights import Prompt, Text, text_of

MOST = 20  # chunks of a prompt; what is longer is cut, and noted
NEAR = 20  # tokens at a chunk's end among which a comma is looked for
STAND_IN = " x"  # one token of every CLIP vocabulary, whatever stands around it

Vectors = Mapping[str, Mapping[str, Float[Tensor, "n D"]]]  # of textual inversions, by the key of a Word: text encoder to vectors


class Chunk(NamedTuple):
    """A part of a prompt that goes through the encoder at once.

    text: with stand-ins for textual inversions. letters: of each of its letters, the letter of the prompt's text that it stands for.
    slots: of a stand-in's letter, which vector of which inversion takes its place.
    """

    text: str
    letters: Sequence[int]
    slots: Mapping[int, tuple[str, int]]


EMPTY = Chunk("", (), {})


def chunks(prompt: Text, tokenizer: Any) -> tuple[list[Chunk], str]:
    """The chunks of a prompt, at least one, and the end that is left out of too many. A str is one chunk, cut by whoever reads it."""
    text, letters, slots = _spelled(prompt)
    if not isinstance(prompt, Prompt):
        return [Chunk(text, letters, slots)], ""
    begins = [bisect_left(letters, at) for at in prompt.breaks]
    parts, at = [], 0
    for end in [*begins, len(text)]:
        while at < end and len(parts) < MOST:
            cut = at + _room(text[at:end], {letter - at for letter, (_, index) in slots.items() if index}, tokenizer)
            parts.append(Chunk(text[at:cut], letters[at:cut], {letter - at: slot for letter, slot in slots.items() if at <= letter < cut}))
            at = cut
    return parts or [EMPTY], prompt.text[letters[at] :] if at < len(text) else ""


def simple(prompts: Sequence[Text], tokenizer: Any, least: int) -> bool:
    """Whether the stock code encodes all of these as they are."""
    return least <= 1 and all(isinstance(prompt, str) or not (prompt.weights or prompt.words) and len(chunks(prompt, tokenizer)[0]) == 1
                              for prompt in prompts)


def encoded(
    prompts: Sequence[Text], tokenizer: Any, least: int, read: Callable[[list[Chunk]], dict[str, Float[Tensor, "n *any"]]]
) -> dict[str, Float[Tensor, "P *any"]]:
    """Every prompt's values: "text" of as many chunks as the longest has, `least` at the least, the rest empty ones; "pooled" of the first.

    read: chunks to their values, each by itself.
    """
    parts = [chunks(prompt, tokenizer)[0] for prompt in prompts]
    count = max(least, *map(len, parts))
    values = read([*(chunk for part in parts for chunk in part), EMPTY])
    text, empty = values["text"], values["text"][-1]
    rows, first = [], []
    for prompt, part in zip(prompts, parts, strict=True):
        begin = sum(map(len, parts[: len(first)]))
        weights = text.new_tensor([_weights(prompt, chunk, tokenizer, text.shape[1]) for chunk in part])
        rows.append(torch.cat([*weighted(text[begin : begin + len(part)], empty, weights), *[empty] * (count - len(part))]))
        first.append(begin)
    return {"text": torch.stack(rows)} | {name: value[first] for name, value in values.items() if name != "text"}


def weighted(text: Float[Tensor, "n L D"], empty: Float[Tensor, "L D"], weights: Float[Tensor, "n L"]) -> Float[Tensor, "n L D"]:
    """Each token moved from the empty prompt's by its weight; one of weight 1 stays as it is, to the bit."""
    weight = weights[..., None]
    return torch.where(weight == 1.0, text, empty + weight * (text - empty))


def token_weights(prompts: Sequence[Text], tokenizer: Any, length: int) -> list[list[float]]:
    """The weights of the tokens of prompts that are read whole, as T5 does, padded to `length`."""
    wholes = [text_of(prompt) for prompt in prompts]
    return [_weights(prompt, Chunk(text, range(len(text)), {}), tokenizer, length) for prompt, text in zip(prompts, wholes, strict=True)]


def offsets(prompt: Text, tokenizer: Any) -> list[tuple[int, int]]:
    """The letters of the prompt's text that each token stands for, chunk after chunk; (0, 0) for one that stands for none."""
    parts, longest = chunks(prompt, tokenizer)[0], tokenizer.model_max_length
    places: list[tuple[int, int]] = []
    for index, chunk in enumerate(parts):
        places += [(0, 0)] * (index * longest - len(places))
        places += [(chunk.letters[a], chunk.letters[b - 1] + 1) if a < b else (0, 0) for a, b in _offsets(chunk.text, tokenizer, longest)]
    return places


@contextmanager
def inverted(encoders: Mapping[str, tuple[Any, Any]], parts: Sequence[Chunk], vectors: Vectors) -> Iterator[None]:
    """While it lasts, these encoders (name to module and tokenizer) read the vectors of textual inversions in place of their stand-ins, in a
    batch of these chunks. Neither vocabularies nor weights are touched."""
    handles = []
    try:
        for name, (encoder, tokenizer) in encoders.items():
            places = [(row, token, vectors[chunk.slots[a][0]][name][chunk.slots[a][1]]) for row, chunk in enumerate(parts) if chunk.slots
                      for token, (a, b) in enumerate(_offsets(chunk.text, tokenizer, tokenizer.model_max_length)) if a < b and a in chunk.slots]
            if places:
                handles.append(encoder.get_input_embeddings().register_forward_hook(_placing(places, len(parts))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _placing(places: Sequence[tuple[int, int, Tensor]], rows: int) -> Callable[..., Tensor]:
    def place(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.shape[0] != rows:
            raise RuntimeError(f"a text encoder read {output.shape[0]} prompts where {rows} with textual inversions were given")
        output = output.clone()
        for row, token, vector in places:
            output[row, token] = vector.to(output)
        return output

    return place


def _spelled(prompt: Text) -> tuple[str, list[int], dict[int, tuple[str, int]]]:
    """The text with stand-ins in place of textual inversions; its letters and slots as a Chunk has them."""
    text = text_of(prompt)
    if not (isinstance(prompt, Prompt) and prompt.words):
        return text, list(range(len(text))), {}
    spelled, letters, slots, at = "", [], {}, 0
    for word in prompt.words:
        spelled, letters = spelled + text[at : word.start], letters + list(range(at, word.start))
        slots |= {len(spelled) + len(STAND_IN) * index + 1: (word.key, index) for index in range(word.count)}
        spelled, letters = spelled + STAND_IN * word.count + " ", letters + [word.start] * (len(STAND_IN) * word.count) + [word.end - 1]
        at = word.end
    return spelled + text[at:], letters + list(range(at, len(text))), slots


def _room(text: str, inner: set[int], tokenizer: Any) -> int:
    """How many letters of the text go into a chunk. inner: letters before which it is not split."""
    room = tokenizer.model_max_length - 2
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    if len(encoding.input_ids) <= room:
        return len(text)
    tokens = tokenizer.convert_ids_to_tokens(encoding.input_ids[:room])
    starts = [a for a, _ in encoding.offset_mapping]
    between = [k for k in range(1, room + 1) if tokens[k - 1].endswith("</w>") and starts[k] not in inner]
    commas = [k for k in between if k > room - NEAR and text[starts[k - 1] : starts[k]].strip() == ","]
    if between:
        return starts[commas[-1] if commas else between[-1]]
    while room > 1 and len(tokenizer(text[: starts[room]], add_special_tokens=False, verbose=False).input_ids) > tokenizer.model_max_length - 2:
        room -= 1  # a word of its own that is longer than a chunk: its parts may take more tokens than it
    return max(starts[room], 1)


def _weights(prompt: Text, chunk: Chunk, tokenizer: Any, length: int) -> list[float]:
    """The weight of each token of a chunk, padded to `length`; a token of several letters has that of its last."""
    if not (isinstance(prompt, Prompt) and prompt.weights):
        return [1.0] * length
    marks = prompt.marks()
    weights = [marks[chunk.letters[b - 1]][0] if a < b else 1.0 for a, b in _offsets(chunk.text, tokenizer, length)]
    return weights + [1.0] * (length - len(weights))


def _offsets(text: str, tokenizer: Any, longest: int) -> list[tuple[int, int]]:
    encoding = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=longest)
    return [tuple(pair) for pair in encoding.offset_mapping]
