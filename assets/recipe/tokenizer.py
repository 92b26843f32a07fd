"""The tokenizer stage: CLIP's byte-level pairs over a small vocabulary, trained on emoji names and the world's captions.

Every byte is an entry, alone and at the end of a word, so any word can be spelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from .art import NAMES
from .objects import HELD_OBJECTS, OBJECTS, article
from .places import HELD_PLACES, PLACES

LENGTH = 32  # tokens in a prompt, both ends included
START, END = "<|startoftext|>", "<|endoftext|>"


def corpus(art: str | Path) -> list[str]:
    """Emoji labels and tags once; the world's own words many times, so that each of them is one entry."""
    data = json.loads((Path(art) / NAMES).read_text())
    lines = [e["label"] for e in data] + [" ".join(e.get("tags", ())) for e in data]
    phrases = [phrase for phrase, _ in (PLACES | HELD_PLACES).values()]
    things = [article(n) for n in (OBJECTS | HELD_OBJECTS)]
    grammar = ["and above below beside a picture of a an the ink drawing pixel art neon lights style"]
    return lines + (phrases + things + grammar) * 60


def build(lines: Iterable[str], entries: int = 1536) -> CLIPTokenizer:
    """Train the merges on ``lines``. The same lines give the same tokenizer."""
    blank = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])
    learner = blank.backend_tokenizer
    learner.model = BPE(end_of_word_suffix="</w>", unk_token=END)
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=entries - 2 - len(alphabet), end_of_word_suffix="</w>", initial_alphabet=alphabet,
                         special_tokens=[AddedToken(START, special=True), AddedToken(END, special=True)],
                         show_progress=False, min_frequency=2)  # fmt: skip
    learner.train_from_iterator(lines, trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
    pieces = alphabet + [f"{a}</w>" for a in alphabet]
    for left, right in merges:
        if (joined := left + right) not in pieces:
            pieces.append(joined)
    vocabulary = {piece: i for i, piece in enumerate([*pieces, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def ids(tokenizer: CLIPTokenizer, captions: list[str]):
    """(B, LENGTH) int64, padded with the end token as the stock pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
