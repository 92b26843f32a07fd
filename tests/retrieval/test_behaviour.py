"""The query side of behaviour: the paper's mean difference, and what it says in words."""

import numpy as np
import pytest

from composition.refusal import Refused
from retrieval import behaviour

WORDS = {"fox": 0, "moon": 1, "ink": 2, "snow": 3}


def read(texts):
    """A bag of words with an offset, whose vectors have any length."""
    rows = np.full((len(texts), 5), 0.1)
    rows[:, 4] = 2.0
    for row, text in zip(rows, texts, strict=True):
        for word, place in WORDS.items():
            row[place] += word in text
    return rows


def test_a_query_is_the_mean_difference_of_texts():
    prompts = ("a fox", "snow", "")
    moved = 0
    for prompt in prompts:
        a, b = read([f"{prompt}, ink on the moon"])[0], read([prompt])[0]
        moved = moved + a / np.sqrt(a @ a) - b / np.sqrt(b @ b)
    query = behaviour.direction(read, " ink  on the\nmoon ", prompts)
    np.testing.assert_allclose(query, moved / np.sqrt(moved @ moved), atol=1e-12)
    assert query[WORDS["ink"]] > 0.5 and query[WORDS["moon"]] > 0.5 and query[WORDS["fox"]] < 0


def test_scores_are_cosines_and_a_lora_without_a_direction_has_none():
    query = np.array([0.6, 0.8])
    np.testing.assert_allclose(behaviour.scores(query, np.array([[0.6, 0.8], [3.0, 4.0], [-0.8, 0.6], [0.0, 0.0]])), [1, 1, 0, 0], atol=1e-12)


@pytest.mark.parametrize("query", ["", " \n"])
def test_a_query_needs_words(query):
    with pytest.raises(Refused, match="words"):
        behaviour.direction(read, query)


def test_a_query_that_the_judge_does_not_read_is_refused():
    with pytest.raises(Refused, match="other words"):
        behaviour.direction(read, "qwerty")


def test_prompts_of_queries_are_not_those_of_behaviours():
    from composition.profiling.behaviour import GENERAL, POCKET

    assert not set(behaviour.GENERAL) & set(GENERAL.prompts) and not set(behaviour.POCKET) & set(POCKET.prompts)
    assert len(behaviour.GENERAL) == len(behaviour.POCKET) == len(GENERAL.prompts) == 8


def test_it_is_said_in_words():
    assert behaviour.words(0.0, 0.0) == "no effect"
    assert behaviour.words(behaviour.STRONG, behaviour.UNSTEADY) == "strong, steady"
    assert behaviour.words(behaviour.WEAK / 2, behaviour.UNSTEADY / 2) == "weak, unsteady"
    assert behaviour.words((behaviour.WEAK + behaviour.STRONG) / 2, 1.0) == "moderate, steady"
