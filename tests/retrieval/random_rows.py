"""Rows of the index with random words and vectors, any of which may be missing."""

import numpy as np

from retrieval.rows import SPACES, Row
from retrieval.words import tokens

WORDS = "dragon neon city owl castle rain watercolour pixel anime ghibli style night forest c++ v1.0 Pokémon".split()
FAMILIES, CATEGORIES, LICENCES = ("sd", "sdxl", "flux"), ("style", "character", "it's \"odd\" \\"), ("", "MIT")
WIDTH = 16


def unit(rng, width=WIDTH):
    """A vector of length 1 that half precision holds exactly."""
    vector = rng.standard_normal(width)
    return (vector / np.linalg.norm(vector)).astype(np.float16).astype(np.float32)


def rows(count, seed=0, spaces=SPACES, share=0.7):
    """share: of the rows that have a vector, in each space."""
    rng = np.random.default_rng(seed)
    made = []
    for number in rng.permutation(count):
        words = " ".join(rng.choice(WORDS, rng.integers(0, 9)))
        vectors = {space: unit(rng) for space in spaces if rng.random() < share}
        made.append(Row(
            id=f"{number:064x}", files=(f"/loras/{number}.safetensors",), name=f"lora{number}", family=str(rng.choice(FAMILIES)),
            category=str(rng.choice(CATEGORIES)), licence=str(rng.choice(LICENCES)), words=words, triggers=tuple(words.split()[:1]),
            strength=float(rng.random()), updated=float(number), **vectors,
        ))  # fmt: skip
    return made


def documents(rows):
    return [tokens(row.words) for row in rows]
