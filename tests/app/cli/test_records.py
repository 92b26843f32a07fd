"""The picture's record from the command line and from Python: the same bytes, no path, made again; prompts of other tools."""

import json

import numpy as np
import pytest
from PIL import Image

from app.remarks import remarks
from composition import Engine, Lora, Refused, Request, record
from tests.composition.record.test_png import _png


@pytest.fixture
def common(toy):
    return ("--model", toy.model, "--lora-dir", toy.loras, "--steps", 2)


def test_python_and_the_command_line_write_the_same_bytes(medley, toy, common, tmp_path):
    assert medley("generate", "a fox <lora:owl:0.5>", "--lora", "fox:0.8", "--seed", 5, *common, "--option", "tau=1", "--method", "switch").code == 0
    with Engine.open(str(toy.model), folders=[toy.loras]) as engine:
        request = Request(prompt="a fox <lora:owl:0.5>", loras=[Lora("fox", weight=0.8)], seed=5, steps=2, method="switch", options={"tau": 1})
        result = engine.run(request)
        path = record.save(result, tmp_path / "api")
    assert path.read_bytes() == (tmp_path / "pictures/0000.png").read_bytes()
    assert record.read(path).weights == {"fox": 0.8, "owl": 0.5} and record.read(path).prompt == "a fox"
    assert any("owl" in line and "tag" in line for line in remarks(result.notes))


def test_a_mask_is_recalled_after_its_file_is_gone(medley, common, tmp_path, toy):
    grey = np.zeros((40, 40), np.uint8)
    grey[:, 20:] = 255
    Image.fromarray(grey).save(tmp_path / "my-mask.png")
    bound = json.dumps({"source": str(toy.loras / "owl.safetensors"), "region": str(tmp_path / "my-mask.png")})
    said = medley("generate", "an owlword", "--lora", bound, "--method", "regions", "--seed", 1, *common)
    assert said.code == 0, said.err
    first = (tmp_path / "pictures/0000.png").read_bytes()
    assert b"my-mask" not in first and str(toy.loras).encode() not in first and str(toy.model).encode() not in first
    (tmp_path / "my-mask.png").unlink()
    again = medley("generate", "--from", "pictures/0000.png", "--model", toy.model, "--lora-dir", toy.loras, "--out", "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again/0000.png").read_bytes() == first
    for words, said in (((), "--model"), (("--model", toy.model), "no LoRA is named 'owl'")):
        lost = medley("generate", "--from", "pictures/0000.png", *words)
        assert lost.code == 2 and said in lost.err
    assert record.details(tmp_path / "pictures/0000.png").receipts["owl"]["sha256"][:12] in lost.err


def test_paths_are_kept_when_asked_for(medley, toy, common, tmp_path):
    source = str(toy.loras / "owl.safetensors")
    assert medley("generate", "an owl", "--lora", source, "--seed", 1, "--keep-paths", *common).code == 0
    kept = record.read(tmp_path / "pictures/0000.png")
    assert (kept.loras[0].source, kept.model) == (source, str(toy.model))
    assert medley("generate", "--from", "pictures/0000.png", "--out", "again").code == 2
    said = medley("generate", "--from", "pictures/0000.png", "--allow-paths", "--keep-paths", "--out", "again")
    assert said.code == 0, said.err
    assert (tmp_path / "again/0000.png").read_bytes() == (tmp_path / "pictures/0000.png").read_bytes()


@pytest.mark.parametrize("region", ["nowhere.png", "pipe.png", "bomb.png"])
def test_a_mask_that_cannot_be_read_is_refused_at_the_door(medley, common, tmp_path, region):
    import os

    from tests.composition.test_door import png

    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    for method in ("regions", "merge"):
        said = medley("generate", "an owlword", "--lora", json.dumps({"source": "owl", "region": region}), "--method", method, *common)
        assert said.code == 2 and region in said.err and "unexpected" not in said.err
    assert not (tmp_path / "pictures").exists()


def test_masks_are_read_once(toy, tmp_path, monkeypatch):
    from composition import pictures

    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    opened = []
    load = pictures.load
    monkeypatch.setattr(pictures, "load", lambda path: opened.append(path) or load(path))
    with Engine.open(str(toy.model), folders=[toy.loras]) as engine:
        engine.run(Request(prompt="an owlword", loras=[Lora("owl", region=str(tmp_path / "mask.png"))], steps=4, method="regions", count=2))
    assert len(opened) == 1


def test_a_tag_is_drawn_as_with_the_flag_and_recalled_once(medley, toy, common, tmp_path):
    tagged = medley("generate", "a fox <lora:owl:0.5>", "--seed", 3, *common)
    flagged = medley("generate", "a fox", "--lora", "owl:0.5", "--seed", 3, *common)
    assert tagged.code == flagged.code == 0, tagged.err
    assert (tmp_path / "pictures/0000.png").read_bytes() == (tmp_path / "pictures/0001.png").read_bytes()
    assert "LoRA owl (weight 0.5) is taken from its tag" in tagged.out and "tag" not in flagged.out
    again = medley("generate", "--from", "pictures/0000.png", "--model", toy.model, "--lora-dir", toy.loras, "--out", "again")
    assert again.code == 0 and (tmp_path / "again/0000.png").read_bytes() == (tmp_path / "pictures/0000.png").read_bytes()


def test_a_tag_of_no_lora_is_refused_and_the_rest_is_said(medley, common):
    said = medley("generate", "a fox <lora:nothing:0.5>", *common)
    assert said.code == 2 and "<lora:nothing:0.5> in the prompt: no LoRA is named 'nothing'" in said.err
    said = medley("generate", "a (fox:1.3) BREAK {a|b}", "--negative", "[a:b:0.5]", *common)
    assert said.code == 0 and "plain words: {a|b}, [a:b:0.5]" in said.out


def test_compare_takes_tags_out_of_the_picture_without_loras(medley, common, tmp_path):
    said = medley("compare", "a fox <lora:owl:0.9>", "--methods", "merge", "--seed", 3, *common)
    assert said.code == 0, said.err
    alone, merged = (record.read(tmp_path / f"pictures/compare-0000-{way}.png") for way in ("prompt", "merge"))
    assert (alone.loras, alone.prompt) == ((), "a fox") and merged.weights == {"owl": 0.9}


def test_a_lora_with_another_hash_is_said(medley, toy, common, tmp_path):
    path = _png(tmp_path / "x.png", parameters='a <lora:fox:1>\nSteps: 2, Seed: 3, CFG scale: 2, Lora hashes: "fox: 17cd20c7b6ea"')
    said = medley("generate", "--from", path, *common)
    assert said.code == 0 and "fox is not the file" in said.err and "17cd20c7b6ea" in said.err
    ours = record.details(tmp_path / "pictures/0000.png").receipts["fox"]["data_sha256"]
    path = _png(tmp_path / "y.png", parameters=f'a <lora:fox:1>\nSteps: 2, Seed: 3, CFG scale: 2, Lora hashes: "fox: {ours[:12]}"')
    assert "not the file" not in medley("generate", "--from", path, *common).err


def test_a_name_that_medley_writes_is_a_name_it_takes(medley, common, tmp_path):
    assert medley("generate", "a fox", "--seed", 2**64 - 1, "--sampler", "Euler a", *common).code == 0
    request = record.read(tmp_path / "pictures/0000.png")
    assert (request.sampler, request.seed) == ("euler-a", 2**64 - 1)


def test_a_seed_of_minus_one_is_drawn(medley, common, tmp_path):
    said = medley("generate", "a fox", "--seed", -1, *common)
    assert said.code == 0 and f"seed {record.read(tmp_path / 'pictures/0000.png').seed} (drawn" in said.out
    assert medley("generate", "a fox", "--seed", -2, *common).code == 2


@pytest.mark.parametrize(("words", "hint"), [
    (("a", "--cfg", 7), "--guidance"), (("a", "--width", 64), "--size"), (("a", "--height", 64), "--size"),
    (("a", "--weight", 1), "--lora owl:0.8"), (("a", "raccoon", "in", "snow"), "quotes"), (("a", "--scheduler", "x"), "--sampler")])
def test_another_tools_words_get_a_hint(medley, words, hint):
    for command in ("generate", "compare"):
        said = medley(command, *words)
        assert said.code == 2 and hint in said.err and said.err.count("\n") == 1


def test_the_engine_refuses_before_it_changes_anything(toy):
    with Engine.open(str(toy.model), folders=[toy.loras]) as engine, pytest.raises(Refused, match="negative prompt"):
        engine.run(Request(prompt="a", negative="<lora:owl:1>", steps=1))
