"""T5's tokenizer over a small vocabulary, trained on the same lines as CLIP's: pieces of words with their likelihood."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer
from transformers import T5Tokenizer

LONGEST = 64  # tokens a prompt may have here, its end included: what the model card calls max_sequence_length
OFTEN = 50  # a word this frequent is one piece: the trainer's own pieces split even the commonest
SPECIAL = ("<pad>", "</s>", "<unk>")  # their places in T5's vocabulary are 0, 1, 2


def build(lines: Sequence[str], entries: int = 1024) -> T5Tokenizer:
    """Train on ``lines``. Every printable ASCII letter is a piece, so any such word can be spelled."""
    learner = Tokenizer(Unigram())
    learner.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)])  # fmt: skip
    letters = sorted(set(string.printable) - set(string.whitespace)) + ["▁"]
    trainer = UnigramTrainer(vocab_size=entries, special_tokens=list(SPECIAL), unk_token="<unk>", initial_alphabet=letters,
                             show_progress=False)  # fmt: skip
    learner.train_from_iterator(lines, trainer)
    pieces = [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"] if piece not in SPECIAL]
    words = Counter(word for line in lines for word in re.findall(r"[a-z]+", line))
    whole = sum(words.values())
    scores = dict(pieces) | {f"▁{word}": math.log(count / whole) for word, count in words.items() if count >= OFTEN}
    rare = min(scores.values()) - 1
    scores = {letter: rare for letter in letters} | scores
    vocabulary = [*((name, 0.0) for name in SPECIAL), *scores.items()]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=LONGEST)


def ids(tokenizer: T5Tokenizer, captions: list[str], length: int = LONGEST) -> torch.Tensor:
    """(B, length) int64, padded with 0 as the stock pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
