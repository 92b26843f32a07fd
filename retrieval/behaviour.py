"""Finds LoRAs by what they do to pictures: a query is a direction in the judge's space, too (CARLoS, arXiv 2512.08826).

A behaviour (`composition.profiles.behaviour`) is how the image vectors move when a LoRA is on. The query's direction is how the text
vectors move when its words are added to prompts; the score is the cosine of the two. Prompts here are other ones than a
behaviour is measured with.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from composition.refusal import Refused

Read = Callable[[Sequence[str]], Float[np.ndarray, "n D"]]

GENERAL = ("a photo of a street", "a woman in a garden", "a dog on a beach", "a bowl of fruit", "a car at night", "a mountain lake",
           "a portrait of a man", "a small house")  # fmt: skip
POCKET = ("a lion in the forest", "a penguin at night", "a house at sunset", "an apple on a blue background", "a bee", "a guitar in the rain",
          "a rabbit in the desert", "a castle in the mountains")  # fmt: skip
STRONG, WEAK = 0.9, 0.4  # of the spread between the base's own pictures; Pocket's LoRAs have 0.57 to 0.97 at weight 1
UNSTEADY = 0.04  # consistency below which a LoRA does to each picture something of its own; Pocket's have 0.03 to 0.24, CARLoS drops below 0.041


def direction(read: Read, query: str, prompts: Sequence[str] = GENERAL) -> Float[np.ndarray, " D"]:
    """Of length 1: the mean of text(prompt + ", " + query) less text(prompt). read: texts to vectors.

    Raises Refused for a query without words, and for one that moves no prompt.
    """
    words = " ".join(query.split())
    if not words:
        raise Refused("a search by behaviour needs words: say what the LoRA should add to a picture")
    count = len(prompts)
    vectors = _unit(np.asarray(read([*prompts, *(f"{prompt}, {words}" for prompt in prompts)]), np.float64))
    moved = (vectors[count:] - vectors[:count]).mean(0)
    length = float(np.linalg.norm(moved))
    if length < 1e-9:
        raise Refused(f"the judge reads no difference when {words!r:.100} is added to a prompt: say it in other words")
    return moved / length


def scores(query: Float[np.ndarray, " D"], directions: Float[np.ndarray, "n D"]) -> Float[np.ndarray, " n"]:
    """The cosine of the query with every LoRA's direction; 0 for a LoRA without one."""
    return _unit(np.asarray(directions, np.float64)) @ query


def words(relative: float, consistency: float) -> str:
    """Of a behaviour for people: "strong, steady". relative: its strength over the base's spread."""
    if relative < 1e-3:
        return "no effect"
    force = "strong" if relative >= STRONG else "weak" if relative < WEAK else "moderate"
    return f"{force}, {'unsteady' if consistency < UNSTEADY else 'steady'}"


def _unit(vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
