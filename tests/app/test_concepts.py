"""Which concepts a picture shows: what is looked for, and what is not judged."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from app import concepts
from composition import Lora, Request

PICTURE = Image.new("RGB", (8, 8))
SEEN = {"a wolf": True, "an owl": False, "in the forest": True, "ink drawing": False, "a fox": False}


class Judge:
    thresholds = dict.fromkeys(SEEN, None)

    def present(self, pictures, phrases):
        return torch.tensor([[SEEN[phrase] for phrase in phrases] for _ in pictures])


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(concepts, "_judge", Judge)


def verdicts(prompt: str, loras: dict[str, tuple[str, ...]], model: str = "pocket", **more: object) -> list[tuple[str, str, bool | None]]:
    receipts = [SimpleNamespace(triggers=words) for words in loras.values()]
    request = Request(prompt=prompt, model=model, steps=4, loras=[Lora(name, **more) for name in loras])
    return [(each.lora, each.phrase, each.present) for each in concepts.verdicts(request, receipts, PICTURE)]


def test_each_lora_is_looked_for_by_its_trigger_words_and_what_else_the_prompt_says(judge):
    found = verdicts("a wolf and an owl in the forest", {"wolf": ("wolf",), "bird": ("Owl",), "mine": ("sks dog",)})
    assert found == [("wolf", "a wolf", True), ("bird", "an owl", False), ("mine", "", None), ("", "in the forest", True)]


def test_loras_that_are_off_and_models_without_a_judge_have_no_verdict(judge):
    assert verdicts("a fox", {"wolf": ("wolf",)}, weight=0.0) == [("", "a fox", False)]
    assert verdicts("a fox", {"wolf": ("wolf",)}, model="somebody/else") == []


def test_what_is_lost_is_said():
    found = [concepts.Verdict("bird", "an owl", False), concepts.Verdict("wolf", "a wolf", True), concepts.Verdict("", "a fox", False), concepts.Verdict("mine", "", None)]
    assert concepts.lost(found) == "the judge does not find bird (an owl) in the picture" and concepts.lost(found[1:]) == ""
    assert [each.text() for each in found] == ["bird not found", "wolf found", "a fox not found", "mine not judged"]
