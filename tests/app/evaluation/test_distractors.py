"""Distractors: drawn evenly, never named, and what is kept and shown is what a judge says of the pictures, with the same noise."""

import csv
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from app.evaluation import distractors, testbed
from app.evaluation.variants import Row, Variants
from composition import Refused, Request
from composition.prompts import says
from tests.app.evaluation.conftest import rows


@pytest.fixture(scope="module")
def table():
    return testbed.read("pocket")


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_every_lora_is_a_target_equally_often_and_no_set_comes_twice(table, count):
    """Also after any number of sets: a smaller draw is the beginning of a larger one."""
    drawn = distractors.drawn(table, count, 40, seed=3)
    assert len({(target.id, frozenset(map(str, others))) for target, others in drawn}) == 40
    for target, others in drawn:
        assert len({target.id, *map(str, others)}) == count + 1
    for sets in (1, 17, 18, 29, 40):
        assert distractors.drawn(table, count, sets, seed=3) == drawn[:sets]
        times = Counter(target.id for target, _ in drawn[:sets])
        assert max(times.values()) - min(times.get(entry.id, 0) for rows in table.values() for entry in rows) <= 1
    assert distractors.drawn(table, count, 40, seed=4) != drawn


def test_distractors_are_of_the_same_and_of_other_categories_and_used_evenly(table):
    for count in (2, 4, 9):
        for target, others in distractors.drawn(table, count, 36):
            kinds = Counter(entry.category for entry in others)
            assert kinds[target.category] >= 1 and len(kinds) >= min(count, 5)
            assert max(kinds.values()) == -(-count // 5)  # as many categories as can be
    drawn = distractors.drawn(table, 1, 36)
    assert {target.category == other.category for target, (other,) in drawn} == {True, False}
    used = Counter(other.id for _, (other,) in drawn)
    assert len(used) == 18 and max(used.values()) - min(used.values()) <= 2


def test_of_one_category_all_are(table):
    for target, others in distractors.drawn(table, 2, 12, of="character"):
        assert {entry.category for entry in (target, *others)} == {"character"}


def test_what_the_prompt_names_is_no_distractor():
    row = lambda name, *words, alone="": testbed._entry({"id": name, "trigger": list(words), "alone": alone}, "character", "t", 0)  # noqa: E731
    small = {"character": [row("fox", "fox"), row("hat", "red hat", "hat", alone="a Fox in a red HAT"), row("owl", "bowl"), row("elk", "elk")]}
    drawn = distractors.drawn(small, 2, 99)
    assert Counter(target.id for target, _ in drawn) == {"fox": 3, "owl": 3, "elk": 3, "hat": 1}  # all there are, and then it ends
    assert {entry.id for target, others in drawn if target.id == "hat" for entry in others} == {"owl", "elk"}
    with pytest.raises(Refused, match="choose from 1 to 2"):
        distractors.drawn(small, 3, 1)
    with pytest.raises(Refused, match="no LoRAs"):
        distractors.drawn({"character": []}, 1, 1)


def test_a_case_asks_for_its_target_alone(table):
    """Its LoRAs stand in the order of the testbed, so that the target has no place of its own in methods that take turns."""
    drawn = distractors.drawn(table, 4, 36)
    cases = distractors.cases(drawn, 2, Request(""), table, weight=0.8, prefix="best, ")
    order = [entry.id for of in table.values() for entry in of]
    places = Counter()
    for case, (target, others) in zip(cases[::2], drawn, strict=True):
        assert case.request.prompt == f"best, {case.text}" and case.text == target.concept.alone and case.concepts == (target.concept,)
        assert {concept.name for concept in case.distractors} == {entry.id for entry in others} and case.size == 5
        assert not any(says(case.request.prompt, word) for entry in others for word in entry.triggers)
        sources = [lora.source for lora in case.request.loras]
        assert sources == sorted(sources, key=order.index) and {lora.weight for lora in case.request.loras} == {0.8}
        places[sources.index(target.id)] += 1
        alone = Variants({}).lora_alone(case).request
        assert [lora.source for lora in alone.loras] == [target.id] and (alone.seed, alone.prompt) == (case.request.seed, case.request.prompt)
    assert len({case.request.seed for case in cases}) == 72 and len(places) > 3


def row(variant, group, number, presence, shown):
    return {"variant": variant, "group": group, "number": number, "size": 3, "presence": presence, "distractor_presence": shown, "distractors": [1]}


def test_kept_lost_and_added_by_hand():
    """Against exact fractions; a picture that no judge could read takes its pair with it."""
    rng = np.random.default_rng(0)
    scored, kept, alone, lost, held, more = [], 0, 0, 0, 0, []
    for group in "abcdefgh":
        for number in range(3):
            base, reference, mine = ([float(rng.random() < chance), Fraction(int(rng.integers(0, 5)), 4)] for chance in (0.1, 0.8, 0.6))
            if (group, number) == ("b", 1):
                mine = [None, None]
            else:
                kept, alone, held, lost = kept + mine[0], alone + reference[0], held + (reference[0] == 1), lost + (reference[0] > mine[0])
                more.append(mine[1] - base[1])
            for name, (presence, shown) in (("none", base), ("lora-alone", reference), ("merge", mine)):
                scored.append(row(name, group, number, presence, None if shown is None else float(shown)))
    section = distractors.section({"all": scored}, ["none", "lora-alone", "merge"], resamples=500, seed=0)
    cells = section.parts["all"]["merge"]
    assert cells["kept"].mean == pytest.approx(kept / alone) and cells["kept"].pictures == 23
    assert cells["lost"].mean == pytest.approx(lost / held) and cells["lost"].pictures == held
    assert cells["added"].mean == pytest.approx(float(sum(more) / len(more)))
    assert cells["kept"].low < cells["kept"].mean < cells["kept"].high
    assert [section.parts["all"]["lora-alone"][name].mean for name in ("kept", "lost")] == [1, 0]
    assert section.parts["all"]["none"]["added"].mean == 0


def test_nothing_is_kept_of_nothing_and_without_distractors_there_is_no_table():
    nothing = [row(name, "a", number, 0.0, 0.5) for name in ("none", "lora-alone", "merge") for number in range(2)]
    cells = distractors.section({"all": nothing}, ["merge"], resamples=100, seed=0).parts["all"]["merge"]
    assert "kept" not in cells and "lost" not in cells and cells["presence"].mean == 0
    plain = [{**each, "distractors": []} for each in nothing]
    assert distractors.section({"all": plain}, ["merge"], resamples=100, seed=0) is None


NAMES = {"fox": "foxword", "owl": "owlword", "ink": "ink drawing"}


@pytest.fixture
def compete(medley, toy, tmp_path):
    """`medley evaluate --distractors` on the toy's three LoRAs."""
    entry = lambda name: {"id": name, "trigger": [NAMES[name]]}  # noqa: E731
    (tmp_path / "bed.json").write_text(json.dumps({"character": [entry("fox"), entry("owl")], "style": [entry("ink")]}))

    def call(*more):
        return medley("evaluate", "--testbed", "bed.json", "--model", toy.model, "--lora-dir", toy.loras, "--steps", 2, "--resamples", 200,
                      "--references", 0, "--tune", "none", "--report", "r", *more)

    return call


def test_a_method_that_ignores_distractors_keeps_everything_and_the_base_shows_what_the_judge_sees(compete, witness, monkeypatch, tmp_path):
    judge = witness(*NAMES.values())
    monkeypatch.setattr(Variants, "row", lambda self, case, name, factor=None: Row(case, name, self.lora_alone(case).request))
    said = compete("--methods", "merge", "--distractors", 2, "--seeds", 3)
    assert said.code == 0, said.err
    document = json.loads((tmp_path / "r/summary.json").read_text())
    (section,) = document["sections"]
    cells = section["parts"]["all"]
    assert list(cells) == ["none", "lora-alone", "merge"] and 0 < cells["lora-alone"]["presence"]["mean"] < 1
    assert [cells["merge"][name]["mean"] for name in ("kept", "lost")] == [1, 0] and cells["merge"]["kept"]["low"] == 1
    assert {name: cell["mean"] for name, cell in cells["merge"].items()} == {name: cell["mean"] for name, cell in cells["lora-alone"].items()}
    scored = rows(tmp_path / "r")
    assert len(scored) == 3 * 3 * 3 and {scored_row["group"] for scored_row in scored} == {"fox among owl+ink", "owl among fox+ink", "ink among fox+owl"}
    shown = []
    for each in scored:
        names = {concept["name"] for concept in each["distractors"]}
        assert names | {each["concepts"][0]["name"]} == set(NAMES) and len(names) == 2
        sees = judge.see([Image.open(tmp_path / "r" / each["picture"])])[0]
        seen = [float(sees @ judge.read([NAMES[concept["name"]]])[0]) >= 0 for concept in each["distractors"]]
        assert [concept["present"] for concept in each["distractors"]] == seen and each["distractor_presence"] == sum(seen) / 2
        shown += seen if each["variant"] == "none" else []
    assert cells["none"]["distractor_presence"]["mean"] == pytest.approx(sum(shown) / len(shown)) and 0 < sum(shown) < len(shown)


def test_the_report_has_them(compete, witness, tmp_path):
    witness(*NAMES.values())
    said = compete("--methods", "merge,composite", "--distractors", "1,2", "--seeds", 1, "--sets", 2)
    assert said.code == 0, said.err
    assert "Distractors" in said.out and "LoRA alone" in said.out and "Kept" in said.out
    document = json.loads((tmp_path / "r/summary.json").read_text())
    (section,) = document["sections"]
    assert set(section["parts"]) == {"all", "2", "3"}  # sizes: the target and its distractors
    assert list(section["parts"]["3"]) == ["none", "lora-alone", "merge", "composite", "composite@equal"]
    assert {concept["name"] for concept in document["distractors"]} <= set(NAMES)
    page = (tmp_path / "r/index.html").read_text()
    assert "Which distractor shows" in page and "Kept" in page and "LoRA alone" in page
    for line in csv.DictReader((tmp_path / "r/scores.csv").open()):
        assert bool(line["distractor2"]) == (line["size"] == "3") and line["distractor1_present"] in ("True", "False")


@pytest.mark.parametrize("arguments, says", [
    (("--distractors", "x"), "--distractors"), (("--distractors", "0"), "1 to 2"), (("--distractors", "7"), "1 to 2"),
    (("--distractors", "1", "--loras", "2"), "leave out --loras"), (("--distractors", "1", "--boxes"), "leave out --boxes"),
    (("--distractors", "1", "--choose", "retrieval"), "leave out --choose"), (("--distractors", "1", "--sets", "all"), "--sets"),
    (("--choose", "me"), "--choose"), (("--choose", "retrieval", "--boxes"), "--boxes"), (("--steps", "0"), "--steps"), (("--steps", "4,x"), "--steps"),
])  # fmt: skip
def test_bad_flags_are_refused(compete, tmp_path, arguments, says):
    said = compete(*arguments)
    assert said.code == 2 and says in said.err, said.err
    assert not (tmp_path / "r/pictures").exists()


@pytest.mark.parametrize("flags", [("--distractors", "2"), ("--choose", "retrieval"), ("--steps", "4,8")])
def test_what_is_for_testbeds_is_not_for_manifests(medley, flags):
    said = medley("evaluate", "m.jsonl", *flags)
    assert said.code == 2 and "needs --testbed" in said.err
