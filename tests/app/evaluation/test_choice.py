"""LoRAs that retrieval chose: the same request where it is right, and how often it is."""

import json
from pathlib import Path

import pytest

from app.evaluation import choice, collect, testbed
from app.evaluation.variants import Variants
from composition import Refused, Request
from retrieval.suggest import Candidate, Reason, Suggestion
from tests.app.evaluation.conftest import rows


class Suggests:
    """A library that suggests LoRAs by name for a prompt; it remembers what it was asked."""

    def __init__(self, folder, by_prompt):
        self.folder, self.by_prompt, self.prompts, self.most = folder, by_prompt, [], set()

    def suggest(self, prompt, *, most):
        self.prompts.append(prompt)
        self.most.add(most)
        return [Suggestion(Candidate(name, name, {}), name, False, (Reason("name", name, 9.0),), trigger, 0.7) for name, trigger in self.by_prompt(prompt)]

    def paths(self, suggestion):
        return [self.folder / "copy" / f"{suggestion.candidate.name}.safetensors", self.path(suggestion)]

    def path(self, suggestion):
        return self.folder / f"{suggestion.candidate.name}.safetensors"


@pytest.fixture
def table(tmp_path):
    for name in ("fox", "owl", "ink"):
        (tmp_path / f"{name}.safetensors").touch()
    row = lambda name, kind: testbed._entry({"id": name, "trigger": [f"{name}word"]}, kind, "t", 0)  # noqa: E731
    return {"character": [row("fox", "character"), row("owl", "character"), row("gone", "character")], "style": [row("ink", "style")]}


def find(folder):
    def call(name):
        if name == "gone":
            raise Refused("gone")
        return folder / f"{name}.safetensors"

    return call


def cases(table, *names):
    entries = {entry.id: entry for of in table.values() for entry in of}
    return testbed.cases([tuple(entries[name] for name in set_) for set_ in names], 2, Request(""), weight=0.9)


def test_where_the_choice_is_right_the_request_is_that_of_the_set(table, tmp_path):
    own = cases(table, ("fox", "ink"), ("owl", "ink"))
    library = Suggests(tmp_path, lambda prompt: [("ink", ""), ("fox" if "fox" in prompt else "owl", "")])  # in another order
    chosen = choice.by_retrieval(own, table, library, find(tmp_path), weight=0.9)
    assert [case.request for case in chosen] == [case.request for case in own] and [case.concepts for case in chosen] == [case.concepts for case in own]
    assert len(library.prompts) == 2 and library.most == {3}  # once for both seeds
    means = {name: cell.mean for name, cell in choice.section(chosen, resamples=100, seed=0).parts["all"]["suggestion"].items()}
    assert means == {"precision": 1, "recall": 1, "exact": 1, "chosen": 2}
    assert choice.section(own, resamples=100, seed=0) is None


def test_a_wrong_choice_comes_at_the_weight_of_all_with_its_trigger_and_what_is_expected_stays(table, tmp_path):
    (own, _) = cases(table, ("fox", "ink"))
    library = Suggests(tmp_path, lambda prompt: [("stranger", "odd"), ("owl", "owlword"), ("fox", "")])
    (chosen,) = choice.by_retrieval([own], table, library, find(tmp_path), weight=0.9)
    assert [lora.name for lora in chosen.request.loras] == ["fox", "owl", "stranger"] and {lora.weight for lora in chosen.request.loras} == {0.9}
    assert chosen.request.prompt == "foxword, inkword, odd, owlword" and (chosen.text, chosen.concepts, chosen.size) == (own.text, own.concepts, 2)
    assert chosen.lora("ink").source == "ink" and chosen.lora("owl") is None  # references are by the set's own
    cells = choice.section([chosen], resamples=100, seed=0).parts["all"]["suggestion"]
    assert (cells["precision"].mean, cells["recall"].mean, cells["exact"].mean, cells["chosen"].mean) == (pytest.approx(1 / 3), 0.5, 0, 3)


def test_none_chosen_has_no_precision_and_is_the_prompt_alone(table, tmp_path):
    own = cases(table, ("fox", "ink"))
    chosen = choice.by_retrieval(own, table, Suggests(tmp_path, lambda prompt: []), find(tmp_path), weight=0.9)
    cells = choice.section(chosen, resamples=100, seed=0).parts["all"]["suggestion"]
    assert {name: cell.mean for name, cell in cells.items()} == {"recall": 0, "exact": 0, "chosen": 0}
    variants = Variants({"composite": {}, "merge": {}}, {("merge", 2, 0): 0.5})
    alone, *others = [row.request for row in variants.rows(chosen[0])]
    assert others == [alone, alone]


@pytest.mark.parametrize("chosen, own, values", [
    ("ab", "ab", (1, 1, 1)), ("abc", "ab", (2 / 3, 1, 0)), ("a", "ab", (1, 1 / 2, 0)), ("cd", "ab", (0, 0, 0)), ("bc", "abd", (1 / 2, 1 / 3, 0)),
])  # fmt: skip
def test_precision_and_recall_by_hand(chosen, own, values):
    quality = choice.quality(set(chosen), set(own))
    assert (quality["precision"], quality["recall"], quality["exact"]) == pytest.approx(values)


def test_an_evaluation_of_what_retrieval_chooses(evaluate, toy, monkeypatch, tmp_path):
    """The fox is found without its style, the owl not at all: its pictures are those of the prompt."""
    library = Suggests(Path(toy.loras), lambda prompt: [("fox", "")] if "fox" in prompt else [])
    monkeypatch.setattr(collect, "opened", lambda model, folders, judge: library)
    said = evaluate("--methods", "merge,composite", "--seeds", 1, "--choose", "retrieval", "--report", "r")
    assert said.code == 0, said.err
    scored = {(row["group"], row["variant"]): row for row in rows(tmp_path / "r")}
    assert [lora["source"] for lora in scored["fox+ink", "merge"]["request"]["loras"]] == ["fox"]
    assert scored["owl+ink", "merge"]["id"] == scored["owl+ink", "composite"]["id"] == scored["owl+ink", "none"]["id"] != scored["fox+ink", "merge"]["id"]
    assert {row["size"] for row in scored.values()} == {2} and [concept["name"] for concept in scored["owl+ink", "merge"]["concepts"]] == ["owl", "ink"]
    document = json.loads((tmp_path / "r/summary.json").read_text())
    (section,) = [each for each in document["sections"] if each["key"] == "choice"]
    assert {name: cell["mean"] for name, cell in section["parts"]["all"]["suggestion"].items()} == {"precision": 1, "recall": 0.25, "exact": 0, "chosen": 0.5}
    assert "Chosen by retrieval" in said.out and "Medley's suggestion" in said.out and "Chosen by retrieval" in (tmp_path / "r/index.html").read_text()
    assert document["tuned"][0]["pictures"] == 7  # weights are tried where something was chosen
