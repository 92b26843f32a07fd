"""Sets as ComposLoRA counts them, drawn evenly and reproducibly; noise is one generator for a set and a seed."""

import json
from collections import Counter

import pytest

from app.evaluation import testbed
from app.evaluation.variants import interleaved, numbers
from composition import Refused, Request


@pytest.fixture(scope="module")
def composlora():
    """ComposLoRA's shape: 3 characters, two of each other category, as one of its two files."""
    many = {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}
    return {category: [testbed._entry({"id": f"{category}_{n}", "name": "x", "trigger": [f"{category} {n}", "more"]}, category, "t", n)
                       for n in range(1, count + 1)] for category, count in many.items()}


@pytest.mark.parametrize("size, count", [(2, 24), (3, 72), (4, 96), (5, 48)])
def test_there_are_as_many_sets_as_the_paper_says(composlora, size, count):
    sets = testbed.sets(composlora, size)
    assert len(sets) == count == len(set(sets))
    for one in sets:
        kinds = [entry.category for entry in one]
        assert kinds.count("character") == 1 and len(set(kinds)) == size


def test_pockets_testbed_has_five_categories_and_natural_prompts():
    table = testbed.read("pocket")
    (full,) = [one for one in testbed.sets(table, 5) if [e.id for e in one] == ["raccoon", "scarf", "rose", "moon", "ink"]]
    assert testbed.prompt(full) == "a raccoon wearing a scarf and a rose on the moon, ink drawing"
    assert [e.concept.phrase for e in full] == ["a raccoon", "a scarf", "a rose", "on the moon", "ink drawing"]
    assert [e.category for e in full] == ["character", "clothing", "object", "place", "style"]


def test_without_phrases_the_prompt_is_all_triggers(composlora):
    one = testbed.sets(composlora, 2)[0]
    assert testbed.prompt(one) == "character 1, more, clothing 1, more"


def test_fewer_sets_are_the_beginning_of_more_and_the_draw_is_even(composlora):
    few, many = testbed.drawn(composlora, 3, 6), testbed.drawn(composlora, 3, 24)
    assert many[:6] == few
    assert testbed.drawn(composlora, 3, 24) == many != testbed.drawn(composlora, 3, 24, seed=1)
    used = Counter(entry.id for one in many for entry in one if entry.category == "character")
    assert max(used.values()) - min(used.values()) <= 2
    assert sorted(map(str, testbed.drawn(composlora, 2, None))) == sorted(map(str, testbed.sets(composlora, 2)))
    assert len(testbed.drawn(composlora, 2, 99)) == 24


def test_noise_is_of_the_set_and_the_seed_and_of_nothing_else(composlora):
    sets = testbed.drawn(composlora, 2, 3)
    like = Request(prompt="")
    made = testbed.cases(sets, 2, like, prefix="best quality, ", weight=0.8)
    assert len({case.request.seed for case in made}) == 6
    assert [case.request.seed for case in testbed.cases(sets[::-1], 1, like)] == [made[4].request.seed, made[2].request.seed, made[0].request.seed]
    pilots = testbed.cases(sets, 2, like, pilot=True)
    assert not {case.request.seed for case in pilots} & {case.request.seed for case in made}
    assert made[0].request.prompt == f"best quality, {made[0].text}" and made[0].request.loras[0].weight == 0.8


@pytest.mark.parametrize("document, says", [
    ([], "categories"), ({"style": []}, "character"), ({"character": [{"name": "x"}]}, "number 1 needs an id"),
    ({"character": [{"id": "x", "trigger": []}]}, "trigger"), ({"character": [{"id": "x", "trigger": "a", "phrase": 3}]}, "texts"),
    ({"character": [{"id": "x", "trigger": "a"}, {"id": "x", "trigger": "b"}]}, "two LoRAs"),
])  # fmt: skip
def test_a_wrong_testbed_is_refused_with_its_place(tmp_path, document, says):
    (tmp_path / "bed.json").write_text(json.dumps(document))
    with pytest.raises(Refused, match=says):
        testbed.read(str(tmp_path / "bed.json"))


def test_what_is_no_testbed_is_refused(tmp_path, composlora):
    (tmp_path / "bed.json").write_text("{")
    for source in (str(tmp_path / "bed.json"), str(tmp_path / "none.json"), "pockett"):
        with pytest.raises(Refused, match="--testbed"):
            testbed.read(source)
    with pytest.raises(Refused, match="1 to 5"):
        testbed.sets(composlora, 6)


def test_numbers_and_limits(composlora):
    assert numbers("2-4,7", "--loras") == [2, 3, 4, 7]
    for wrong in ("", "a", "4-2", "1.5"):
        with pytest.raises(Refused, match="--loras"):
            numbers(wrong, "--loras")
    cases = [case for size in (2, 3) for case in testbed.cases(testbed.drawn(composlora, size, 4), 1, Request(prompt=""))]
    assert [case.size for case in interleaved(cases, 5)] == [2, 2, 2, 3, 3]
    assert interleaved(cases, None) == cases


def test_sets_of_one_category_and_regions_side_by_side():
    """All 15 pairs and 20 triples of Pocket's six characters; their columns tile the picture."""
    table = testbed.read("pocket")
    pairs, triples = (testbed.sets(table, size, "character") for size in (2, 3))
    assert (len(pairs), len(triples)) == (15, 20) and len({frozenset(map(str, one)) for one in pairs}) == 15
    assert {entry.category for one in triples for entry in one} == {"character"}
    assert testbed.drawn(table, 2, 5, of="character") == testbed.drawn(table, 2, 8, of="character")[:5]
    one = next(one for one in triples if [entry.id for entry in one] == ["raccoon", "owl", "wolf"])
    plain, boxed = (testbed.cases([one], 1, Request(""), boxes=boxes)[0].request for boxes in (False, True))
    assert plain.prompt == boxed.prompt == "a raccoon, an owl and a wolf" and plain.seed == boxed.seed
    assert [lora.region for lora in plain.loras] == [None] * 3
    edges = [lora.region[0] for lora in boxed.loras] + [boxed.loras[-1].region[2]]
    assert edges == pytest.approx([0, 1 / 3, 2 / 3, 1]) and all(lora.region[1::2] == (0, 1) for lora in boxed.loras)
    for of, size in (("characters", 2), ("character", 7)):
        with pytest.raises(Refused, match="character \\(6\\)"):
            testbed.sets(table, size, of)


def test_several_objects_are_joined_with_and_once():
    rows = testbed.read("pocket")["object"][:2]
    assert testbed.prompt(tuple(rows)).count(" and ") == 1
