"""Suggestions on vectors drawn at random: what a prompt asks for is found, chance is not, hubs are not, and literal words count."""

import numpy as np
import pytest

from retrieval.phrases import Words, in_words_of, split
from retrieval.suggest import Candidate, suggest, threshold

WIDTH = 64
NOTHING = [f"word{number}" for number in range(400)]


def vector(text: str) -> np.ndarray:
    """A direction of its own for every text."""
    drawn = np.random.default_rng(list(text.lower().encode())).standard_normal(WIDTH)
    return drawn / np.linalg.norm(drawn)


def vectors(texts):
    return np.stack([vector(text) for text in texts])


def lora(name: str, means: str | None = None, noise: float = 0.5, **more) -> Candidate:
    """A LoRA whose behaviour is near the direction of what it means."""
    mixed = vector(means or f"nothing {name}") + noise * vector(f"noise of {name}")
    return Candidate(name, more.pop("called", f"file{name}"), {"behaviour": mixed / np.linalg.norm(mixed)}, **more)


QUERIES, NULL = {"behaviour": vectors}, {"behaviour": vectors(NOTHING)}
LIBRARY = [lora("1", "dragon"), lora("2", "neon"), lora("3", "owl"), *(lora(f"other{number}") for number in range(200))]


def names(prompt, library=LIBRARY, **more):
    return [each.candidate.id for each in suggest(prompt, library, QUERIES, NULL, **more)]


def test_what_the_prompt_asks_for_is_found_without_any_word_of_it_in_the_library():
    found = suggest("a dragon in a neon city", LIBRARY, QUERIES, NULL)
    assert {each.candidate.id: each.phrase for each in found} == {"1": "dragon", "2": "neon"}
    assert all(each.reasons[0].evidence == "behaviour" and each.reasons[0].score > 4 and each.trigger == "" for each in found)
    assert "what it does to pictures answers to 'dragon'" in found[0].reasons[0].text() + found[1].reasons[0].text()


def test_none_when_none_fits():
    assert names("a submarine under the sea at night with a lighthouse") == []
    assert names("") == [] and names("masterpiece, best quality") == [] and names("a dragon", []) == []


def test_chance_is_held_in_a_large_library():
    """Of 40 prompts of four unknown words each on 2,000 unrelated LoRAs, few find anything: 2 % a phrase and kind of vector."""
    library = [lora(f"unrelated{number}") for number in range(2000)]
    found = sum(len(names(f"thing{a}, thing{a + 1000}, thing{a + 2000}, thing{a + 3000}", library)) > 0 for a in range(40))
    assert found <= 12
    assert 2.0 < threshold(1) < 2.1 and 3.5 < threshold(100) < 3.6 and 4.4 < threshold(5000) < 4.5


def test_a_lora_that_is_near_everything_is_near_nothing():
    """Its cosine with the phrase is the largest of all, and so it is with every other phrase."""
    common = vector("what all phrases share")

    def make(texts):
        mixed = 0.9 * common + 0.5 * vectors(texts)
        return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)

    hub = Candidate("hub", "hub file", {"behaviour": common})
    library, queries, null = [hub, *LIBRARY], {"behaviour": make}, {"behaviour": make(NOTHING)}
    assert (common @ make(["dragon"]).T)[0] > (LIBRARY[0].vectors["behaviour"] @ make(["dragon"]).T)[0]
    assert [each.candidate.id for each in suggest("a dragon", library, queries, null)] == ["1"]


def test_each_phrase_is_served_once_and_twins_are_not_both_taken():
    twin = Candidate("twin", "twin", LIBRARY[0].vectors)
    also = lora("also", "dragon", noise=1.0)
    assert names("a dragon", [*LIBRARY, twin, also]) == ["1"]
    bright = lora("bright", "bright thing", noise=0.01)
    same = Candidate("same", "file same", {"behaviour": bright.vectors["behaviour"]})
    assert names("a bright thing", [bright, same]) == ["bright"]


def test_at_most_three():
    library = [lora(word, word) for word in ("fox", "owl", "moon", "snow", "lamp")]
    assert len(names("a fox, an owl, a moon, snow, a lamp", library)) == 3
    assert len(names("a fox, an owl, a moon, snow, a lamp", library, most=5)) == 5


@pytest.mark.parametrize(("prompt", "evidence", "words"), [
    ("a sks cat", "trigger", "sks cat"), ("the Top Hat", "name", "top hat"), ("something gothic", "tag", "gothic")])
def test_words_that_the_prompt_says(prompt, evidence, words):
    library = [Candidate("x", "top_hat-v2", {}, triggers=("sks cat",), tags=("gothic",), weight=0.7), *LIBRARY]
    found = suggest(prompt, library, QUERIES, NULL)
    assert [(each.candidate.id, each.reasons[0].evidence, each.reasons[0].words.lower(), each.weight) for each in found] == [("x", evidence, words, 0.7)]
    assert found[0].trigger == ("" if evidence == "trigger" else "sks cat")


@pytest.mark.parametrize("name", ["a", "in", "the-style", "b2", "00", "v1.5", "xy"])
def test_a_name_that_tells_nothing_is_not_said(name):
    assert suggest("a submarine in the style of b2 xy, v1.5 00", [Candidate("x", name, {})], QUERIES, NULL) == []


def test_evidence_without_queries_or_null_is_not_looked_at():
    assert suggest("a dragon", LIBRARY, {}, NULL) == [] and suggest("a dragon", LIBRARY, QUERIES, {}) == []


@pytest.mark.parametrize(("prompt", "phrases"), [
    ("a dragon in a neon city", ["dragon", "neon city", "neon", "city"]),
    ("portrait of a woman wearing a top hat, masterpiece, 8k", ["portrait", "woman", "top hat", "top", "hat"]),
    ("A fox and a fox AND A FOX", ["fox"]), ("best quality, 4k", []), ("", [])])
def test_phrases(prompt, phrases):
    assert [phrase.text for phrase in split(prompt)] == phrases


@pytest.mark.parametrize(("prompt", "everywhere"), [
    ("a dragon in a neon city", ["neon city", "neon", "city"]), ("an owl, ink style", ["ink"]), ("a fox with a hat at the beach", ["beach"]), ("a fox", [])])
def test_what_is_everywhere(prompt, everywhere):
    assert [phrase.text for phrase in split(prompt) if phrase.everywhere] == everywhere


def test_a_long_prompt_has_few_phrases_and_takes_no_time():
    assert len(split("word " * 20_000 + "," * 20_000)) <= 16
    assert len(split(", ".join(f"thing number{number}x" for number in range(5000)))) <= 16


def test_words_of_a_prompt():
    assert Words("An OWL, flying").say("owl") and Words("a top hat").say("top hat") and not Words("a bowl").say("owl")
    assert not Words("hat top").say("top hat") and not Words("a").say("") and Words("<lora> 猫").say("猫")


def test_a_phrase_in_the_words_of_a_judge():
    names = ["neon lights", "a robot", "in the city", "a city of neon lights"]
    assert [in_words_of(names, text) for text in ("neon", "the robot", "city", "neon city", "a fox", "")] == [
        "neon lights", "a robot", "in the city", "a city of neon lights", "a fox", ""]


def test_weights_are_asked_of_loras_without_a_behaviour():
    def both(*spaces):
        own = lora("1", "dragon").vectors["behaviour"]
        vectors_of = {"weight": own} if spaces == ("weight",) else {"weight": own, "behaviour": lora("1", "owl").vectors["behaviour"]}
        return [Candidate("1", "x", vectors_of), *LIBRARY[3:]]

    queries, null = QUERIES | {"weight": vectors}, NULL | {"weight": NULL["behaviour"]}
    (found,) = suggest("a dragon", both("weight"), queries, null)
    assert [reason.evidence for reason in found.reasons] == ["weight"] and "its weights answer to 'dragon'" in found.reasons[0].text()
    assert suggest("a dragon", both("weight", "behaviour"), queries, null) == [], "its weights say a dragon, its pictures an owl"
    (found,) = suggest("an owl", both("weight", "behaviour"), queries, null)
    assert [reason.evidence for reason in found.reasons] == ["behaviour"]
