"""Manifests: requests and pictures a line, bad lines by number, what `medley generate` wrote, HF imagefolder."""

import json
import re

import pytest
from PIL import Image

from app.evaluation import manifest
from composition import Refused


def nothing(source):
    return None


def write(folder, *lines, name="metadata.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def picture(folder, name="a.png", colour="red"):
    Image.new("RGB", (16, 16), colour).save(folder / name)


def test_requests_and_pictures(tmp_path):
    picture(tmp_path)
    write(tmp_path, {"prompt": "a fox", "seed": 4, "loras": [{"source": "owl", "triggers": ["owl"], "category": "character"}]},
          {"file_name": "a.png", "text": "a fox and an owl", "concepts": ["a fox", {"phrase": "an owl", "name": "owl"}], "camera": "any"})
    asked = manifest.read(tmp_path, nothing)
    assert not asked.problems
    request, supplied = asked.cases
    assert (request.request.seed, request.text, request.group, request.picture) == (4, "a fox", "a fox", None)
    assert [(c.name, c.phrase) for c in request.concepts] == [("owl", "an owl")]
    assert supplied.picture == tmp_path / "a.png" and supplied.request is None and supplied.method == "supplied"
    assert [(c.name, c.phrase) for c in supplied.concepts] == [("a fox", "a fox"), ("owl", "an owl")]


@pytest.mark.parametrize("line, says", [
    ("{", "JSON"), ("[1]", "object"), ({"file_name": "gone.png", "text": "x"}, "gone.png.*missing"), ({"file_name": "a.png"}, "text"),
    ({"prompt": "x", "steps": 0}, "steps"), ({"prompt": "x", "colour": 1}, "colour"), ({"seed": 1}, "neither"),
    ({"prompt": "x", "concepts": "a fox"}, "list"), ({"prompt": "x", "concepts": [{"name": "y"}]}, "phrase"),
    ({"prompt": "x", "concepts": [{"phrase": "y", "references": ["no.png"]}]}, "no.png"),
    ({"prompt": "x", "concepts": [{"phrase": "y", "size": 3}]}, "size"), ({"file_name": 3, "text": "x"}, "file_name"),
    ({"prompt": "x", "model": "another"}, "for the model another, and this evaluation runs on pocket"),
    ({"prompt": "x", "group": 3}, "group"), ({"file_name": "a.png", "text": "x", "request": "{}"}, "prompt"),
])  # fmt: skip
def test_a_bad_line_is_named_by_its_number_and_the_others_stay(tmp_path, line, says):
    picture(tmp_path)
    good = {"file_name": "a.png", "text": "fine"}
    asked = manifest.read(write(tmp_path, good, "", line, good), nothing)
    assert len(asked.cases) == 2
    (problem,) = asked.problems
    assert problem.line == 3 and str(problem).startswith("line 3: ")
    assert re.search(says, problem.why)


def test_a_request_leaves_steps_and_guidance_to_the_model(tmp_path):
    cases = manifest.read(write(tmp_path, {"prompt": "a fox"}, {"prompt": "a fox", "steps": 7, "guidance": 2}), nothing, "pocket-flux").cases
    assert [(case.request.model, case.request.steps, case.request.guidance) for case in cases] == [("pocket-flux", None, None), ("pocket-flux", 7, 2)]


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n{"prompt": "a fox"}\n')
    asked = manifest.read(tmp_path / "m.jsonl", nothing)
    assert [problem.line for problem in asked.problems] == [1] and len(asked.cases) == 1


def test_an_unknown_lora_is_the_lines_problem(tmp_path):
    def refuse(source):
        raise Refused(f"no LoRA is named {source!r}")

    asked = manifest.read(write(tmp_path, {"prompt": "x", "loras": [{"source": "wolff"}]}, {"prompt": "y"}), refuse)
    assert "wolff" in asked.problems[0].why and len(asked.cases) == 1


def test_no_manifest_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl", write(tmp_path, "", name="empty.jsonl")):
        with pytest.raises(Refused):
            manifest.read(path, nothing)


def test_pictures_of_two_methods_pair_by_their_turn_and_requests_by_their_seed(tmp_path):
    for name in "abcd":
        picture(tmp_path, f"{name}.png")
    asked = manifest.read(write(tmp_path, *({"file_name": f"{name}.png", "text": "a fox", "method": method}
                                            for name, method in zip("abcd", ("x", "y", "x", "y"), strict=True))), nothing)
    assert [(case.method, (case.group, case.seed)) for case in asked.cases] == [
        ("x", ("a fox", 0)), ("y", ("a fox", 0)), ("x", ("a fox", 1)), ("y", ("a fox", 1))]


def test_no_two_lines_answer_for_one_another(tmp_path):
    """The same prompt and seed twice, with other weights."""
    lines = [{"prompt": "x", "seed": 7, "loras": [{"source": "owl", "weight": weight}]} for weight in (0.5, 1.0)]
    asked = manifest.read(write(tmp_path, *lines), nothing)
    assert len({case.key for case in asked.cases}) == 2 and {case.group for case in asked.cases} == {"x"}


@pytest.mark.parametrize("trigger, category, phrase", [
    ("raccoon", "character", "a raccoon"), ("owl", "character", "an owl"), ("sunglasses", "clothing", "sunglasses"),
    ("on the moon", "place", "on the moon"), ("ink drawing", "style", "ink drawing"), ("ohwx_man", "character", "ohwx_man"),
    ("Kamado Nezuko", "character", "Kamado Nezuko"), ("a cat", "character", "a cat"), ("top hat", "clothing", "a top hat"),
])  # fmt: skip
def test_what_a_judge_is_asked_for_a_trigger(trigger, category, phrase):
    assert manifest.phrase(trigger, category) == phrase
