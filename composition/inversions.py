"""Textual inversions: files of learned vectors that stand for a word of a prompt, for one run only.

`embedding:name` in a prompt names one, as in ComfyUI; an Embedding of a request says which word it stands for. The vectors take the places of
stand-ins while the prompt is encoded (`backbones.chunks`): no vocabulary and no weight is changed, so that nothing has to be given back.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from composition import prompt_syntax, prompts
from composition.loras.safetensors import load_safely
from composition.prompt_weights import Prompt, Word, text_of
from composition.refusal import Refused
from composition.request import EMBEDDINGS_NOTE, MAX_EMBEDDINGS, UNNAMED_NOTE, Embedding, Request

MOST = 75  # vectors of one: a chunk of a prompt

_NAMED = re.compile(r"(?<![\w:])embedding:([\w-]+(?:\.[\w-]+)*)")
_FIRST, _SECOND = "text_encoder", "text_encoder_2"
_SDXL = {"clip_l": _FIRST, "clip_g": _SECOND}
_OF_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's second text encoder"}


class Inversion(NamedTuple):
    """The vectors of a file for each text encoder, by its name; all have as many. word: the one the file itself names, "" for none."""

    sha256: str
    vectors: Mapping[str, Float[Tensor, "n D"]]
    word: str = ""

    @property
    def count(self) -> int:
        return next(iter(self.vectors.values())).shape[0]


def settled(request: Request, find: Callable[[str], Path]) -> Request:
    """The request with the textual inversions that its prompts name among its own, each with the word it stands for. It settles to itself.

    find: a source to its file. Raises Refused for what is not there, a word that two stand for, and for too many.
    """
    embeddings = [replace(each, word=each.word or read(_file_of(each.source, find)).word or each.name) for each in request.embeddings]
    known = {each.word.lower() for each in embeddings}
    if len(known) < len(embeddings):
        raise Refused(f"two textual inversions stand for the same word ({', '.join(each.word for each in embeddings)}): give each its own, as in "
                      "--embedding FILE:WORD")
    if request.schema_version >= prompt_syntax.WEIGHTED:
        for text in map(text_of, prompt_syntax.prompts_of(request)):
            for match in _NAMED.finditer(text):
                if match[0].lower() not in known:
                    known.add(match[0].lower())
                    embeddings.append(Embedding(match[1].removesuffix(".safetensors"), match[0]))
    if len(embeddings) > MAX_EMBEDDINGS:
        raise Refused(f"the prompts name {len(embeddings)} textual inversions; a request has at most {MAX_EMBEDDINGS}")
    for each in embeddings:
        _file_of(each.source, find)
    return replace(request, embeddings=embeddings)


def opened(request: Request, find: Callable[[str], Path], backbone: Any) -> dict[str, Inversion]:
    """The textual inversions of a settled request, by their words. Raises Refused for a file of another model, or that is none."""
    if request.embeddings and backbone.family not in ("sd", "sdxl"):
        raise Refused("textual inversions are read with Stable Diffusion 1.x, 2.x and SDXL; this model reads prompts through other encoders")
    widths = {name: module.config.hidden_size for name, module in backbone.components.items() if name in (_FIRST, _SECOND)}
    result = {}
    for each in request.embeddings:
        result[each.word] = inversion = read(path := _file_of(each.source, find))
        if missing := [name for name in widths if name not in inversion.vectors]:
            raise Refused(f"{path.name} has no vectors for the model's {missing[0]}: {_origin(inversion)}")
        for name, width in widths.items():
            if inversion.vectors[name].shape[1] != width:
                raise Refused(f"{path.name} has vectors of {inversion.vectors[name].shape[1]} numbers and this model's {name} reads {width}: "
                              + _origin(inversion))
        if extra := [name for name in inversion.vectors if name not in widths]:
            raise Refused(f"{path.name} has vectors for a {extra[0]}, which this model lacks: {_origin(inversion)}")
    return result


def noted(request: Request, opened: Mapping[str, Inversion]) -> dict[str, Any]:
    """What the picture's record says of them: hashes, and words that no prompt has."""
    texts = [text_of(prompt) for prompt in prompt_syntax.prompts_of(request)]
    unused = [word for word in opened if not any(prompts.says(text, word) for text in texts)]
    return ({EMBEDDINGS_NOTE: {word: {"sha256": each.sha256, "vectors": each.count} for word, each in opened.items()}} if opened else {}) | (
        {UNNAMED_NOTE: unused} if unused else {})


def named(prompt: Prompt, opened: Mapping[str, Inversion]) -> Prompt:
    """The prompt with the places of their words; of words that overlap the first, and the longer one, counts."""
    places = sorted((start, -end, word) for word in opened for start, end in prompts.standing(prompt.text, word))
    words: list[Word] = []
    for start, end, word in places:
        if not words or start >= words[-1].end:
            words.append(Word(start, -end, opened[word].sha256, opened[word].count))
    return prompt._replace(words=tuple(words))


def vectors(opened: Mapping[str, Inversion]) -> dict[str, Mapping[str, Tensor]]:
    """The vectors of each, by its hash."""
    return {each.sha256: each.vectors for each in opened.values()}


def read(path: Path) -> Inversion:
    """A textual inversion as A1111 (emb_params), SDXL's trainers (clip_l, clip_g) and diffusers (one tensor named by its word) write them.

    Raises Refused for any other file, as LoRA files do, and for one with too many vectors.
    """
    file = load_safely(path)
    tensors = {name: tensor.reshape(1, -1) if tensor.ndim == 1 else tensor for name, tensor in file.tensors.items()}
    if any(tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point() for tensor in tensors.values()):
        raise Refused(f"{path.name} is no textual inversion: it holds tensors that are no vectors")
    if set(tensors) == set(_SDXL):
        vectors, word = {_SDXL[name]: tensor for name, tensor in tensors.items()}, ""
    elif len(tensors) == 1:
        name, tensor = next(iter(tensors.items()))
        vectors, word = {_SDXL.get(name, _FIRST): tensor}, "" if name in ("emb_params", "*", *_SDXL) or len(name) > 100 else name
    else:
        raise Refused(f"{path.name} is no textual inversion: it holds {len(tensors)} tensors, where one was expected (emb_params), or clip_l and clip_g "
                      "for SDXL")
    counts = {tensor.shape[0] for tensor in vectors.values()}
    if len(counts) > 1 or max(counts) > MOST:
        raise Refused(f"{path.name} has {' and '.join(map(str, sorted(counts)))} vectors; as many for each text encoder, and at most {MOST}, are read")
    return Inversion(file.sha256, vectors, word)


def _origin(inversion: Inversion) -> str:
    if len(inversion.vectors) == 2:
        return "it was made for SDXL"
    width = next(iter(inversion.vectors.values())).shape[1]
    return f"it was made for {_OF_WIDTH.get(width, 'another model')}"


def _file_of(source: str, find: Callable[[str], Path]) -> Path:
    path = Path(source).expanduser()
    if path.suffix and path.is_file():
        return path
    try:
        return find(source)
    except Refused as error:
        raise Refused(f"textual inversion {source!r:.200}: {error}") from None


def sources(embeddings: Sequence[Embedding], find: Callable[[str], Path]) -> list[Path]:
    """The files of a settled request's textual inversions."""
    return [_file_of(each.source, find) for each in embeddings]
