"""CLIP's tokenizer for models that come without one, from what this machine already has.

A checkpoint file holds weights only, and every Stable Diffusion reads its prompt through the same vocabulary: 256 byte
letters, each also as the end of a word, and 48,894 merges in order of rank. The merges alone rebuild it. They lie in
any installed open_clip, and in the hub cache of anyone who has used CLIP or Stable Diffusion; the network comes last.
"""

import gzip
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import CLIPTokenizer

from composition.refusal import Refused

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 48_894
PACKAGES = ("open_clip", "clip")  # both carry the file below
PACKED = "bpe_simple_vocab_16e6.txt.gz"
REPOSITORIES = (
    ("openai/clip-vit-large-patch14", "merges.txt"),
    ("openai/clip-vit-base-patch32", "merges.txt"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/merges.txt"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/merges.txt"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/merges.txt"),
)


def tokenizer(pad: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer, 49,408 tokens, prompts of 77. pad: END for CLIP itself, "!" for OpenCLIP's text encoders.

    Raises Refused, saying what to install, when its vocabulary cannot be obtained.
    """
    return build(_merges(), pad)


def build(merges: Sequence[tuple[str, str]], pad: str = END) -> CLIPTokenizer:
    """A CLIP tokenizer from its merges, first ranks first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    pairs: Any = list(merges)
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, pad_token=pad, model_max_length=77)


@cache
def _merges() -> tuple[tuple[str, str], ...]:
    for path in _candidates():
        merges = read(path)
        if merges:
            return merges
    repository, name = REPOSITORIES[0]
    try:
        merges = read(Path(hf_hub_download(repository, name)))
    except Exception:  # offline, refused, a proxy's page: whichever it was, the answer to the user is the same
        merges = None
    if merges:
        return merges
    raise Refused("a checkpoint file holds no vocabulary for its prompts, and CLIP's is not on this machine: "
                  "pip install open-clip-torch (it has the vocabulary), or give a model's diffusers folder")


def _candidates() -> Iterator[Path]:
    """Files on this machine that may hold the merges; packages are located, not imported."""
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield Path(folder) / PACKED
    for repository, name in REPOSITORIES:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            yield Path(cached)


def read(path: Path) -> tuple[tuple[str, str], ...] | None:
    """The merges in a file of either kind (packed with more than CLIP uses, or merges.txt), None when it does not hold all of them."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    pairs = [tuple(line.split()) for line in text.split("\n")[1 : MERGES + 1]]
    return tuple((pair[0], pair[1]) for pair in pairs) if [len(pair) for pair in pairs] == [2] * MERGES else None
