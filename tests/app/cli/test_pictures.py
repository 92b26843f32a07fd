"""`--picture` and its kin become a Picture, `--hires` a Hires, or one plain sentence; the terminal says what ran."""

import re

import pytest
from PIL import Image

from app.cli import flags
from composition import Hires, Picture, Refused, Request

GIVEN = {"start_from": "photo.png", "strength": 0.4, "mask": "mask.png", "soft": 2, "fit": "contain"}


@pytest.mark.parametrize(("text", "hires"), [
    ("1.5", Hires(1.5)), ("2:0.4", Hires(2.0, strength=0.4)), (" 2 : .4 ", Hires(2.0, strength=0.4)), ("none", None),
    ('{"factor": 2, "steps": 9, "space": "latent"}', Hires(2.0, steps=9, space="latent")),
])
def test_hires(text, hires):
    assert flags.hires(text) == hires


@pytest.mark.parametrize(("text", "what"), [
    ("", "FACTOR"), ("big", "FACTOR"), ("1.5:0.4:3", "FACTOR"), ("1", "factor: must be"), ("5", "factor: must be"), ("2:0", "strength: must be"), ("{", "JSON"),
    ('{"times": 2}', "times: is no field"), ("2:1.5", "strength: must be"),
])
def test_hires_refused(text, what):
    with pytest.raises(Refused, match=f"^--hires.*{what}"):
        flags.hires(text)


def test_the_picture_of_the_flags():
    picture = Picture("photo.png", 0.4, "mask.png", 2, "contain")
    asked, _ = flags.request({"prompt": "a fox", "hires": "2", **GIVEN})
    assert (asked.picture, asked.hires) == (picture, Hires(2.0))
    assert flags.request({"strength": 0.9}, asked)[0].picture == Picture("photo.png", 0.9, "mask.png", 2, "contain")
    assert flags.request({"start_from": "b.png"}, asked)[0].picture == Picture("b.png")
    again, _ = flags.request({"start_from": "none", "hires": "none"}, asked)
    assert (again.picture, again.hires) == (None, None)
    assert flags.request({"steps": 3}, asked)[0] == Request(**{**vars(asked), "steps": 3})


@pytest.mark.parametrize(("given", "what"), [
    ({"strength": 0.4}, "--strength says how a picture"), ({"mask": "m.png"}, "--mask says how a picture"), ({"start_from": "a.png", "strength": 0.0}, "strength"),
    ({"start_from": "a.png", "fit": "tile"}, "fit"), ({"start_from": "a.png", "soft": 99}, "soft"),
])
def test_refused(given, what):
    with pytest.raises(Refused, match=what):
        flags.request({"prompt": "a fox", **given})


@pytest.mark.parametrize(("flag", "ours"), [("--init-image", "--picture"), ("--denoising-strength", "--strength"), ("--mask-blur", "--soft"), ("--hires-fix", "--hires")])
def test_another_tools_flag_leads_to_ours(medley, flag, ours):
    said = medley("generate", "a fox", flag, "x")
    assert said.code == 2 and ours in said.err


def test_generate_from_a_picture(medley, toy, tmp_path):
    Image.new("RGB", (60, 40), "navy").save(tmp_path / "me.png")
    mask = Image.new("L", (60, 40))
    mask.paste(255, (30, 0, 60, 40))
    mask.save(tmp_path / "mask.png")
    common = ("--model", toy.model, "--lora-dir", toy.loras, "--out", "made", "--steps", 4, "--seed", 1)
    said = medley("generate", "a fox", "--lora", "fox", "--picture", "me.png", "--mask", "mask.png", "--strength", 0.5, "--size", "32x32", "--hires", "1.5", *common)
    assert said.code == 0, said.err
    assert "brought from 60x40 to 32x32 pixels (what stands out was cut off)" in said.out
    assert re.search(r"started from me.png at strength 0.5: 2 of 4 steps ran; (4\d|50)% of it is kept to the bit", said.out)
    assert "hires pass at 48x48, strength 0.5: 2 of 4 steps ran" in said.out
    again = medley("generate", "--from", "made/0000.png", *common[:2], "--lora-dir", toy.loras, "--out", "again")
    assert again.code == 0, again.err
    with Image.open(tmp_path / "made/0000.png") as first, Image.open(tmp_path / "again/0000.png") as second:
        assert first.size == (48, 48) and first.tobytes() == second.tobytes()
        assert first.getpixel((2, 20)) == (0, 0, 128)


def test_compare_from_a_picture(medley, toy, tmp_path):
    Image.new("RGB", (32, 32), "navy").save(tmp_path / "me.png")
    said = medley("compare", "a fox", "--lora", "fox", "--lora", "owl", "--methods", "merge,composite", "--picture", "me.png", "--strength", 0.5, "--steps", 4,
                  "--model", toy.model, "--lora-dir", toy.loras, "--out", "made")
    assert said.code == 0, said.err
    assert "2 of 4 steps ran" in said.out and "No LoRA" in said.out
