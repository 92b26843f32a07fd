"""What other tools read of our pictures, and what we read of theirs."""

from dataclasses import replace

import pytest

from composition import Lora, Refused, Request
from composition.backbones.schedulers import NAMES
from composition.record import infotext
from tests.app import reader


def test_an_independent_reader_finds_everything(result):
    text = infotext.write(result.request, result.receipts, (48, 32))
    read = reader.parameters(text)
    assert read["Prompt"] == result.request.prompt + " <lora:ink:0.8> <lora:owl:0.5:1.2>"
    assert read["Negative prompt"] == result.request.negative
    assert reader.tags(read["Prompt"]) == [["ink", "0.8"], ["owl", "0.5", "1.2"]]  # text encoder first
    assert reader.hashes(read["Lora hashes"]) == {"ink": "a" * 12, "owl": "b" * 12}
    assert {key: read[key] for key in ("Steps", "Sampler", "CFG scale", "Seed", "Size-1", "Size-2", "Model")} == {
        "Steps": "12", "Sampler": "Euler a", "CFG scale": "4.5", "Seed": "41", "Size-1": "48", "Size-2": "32",
        "Model": "pocket"}
    assert read["Version"].startswith("Medley ")


def test_lora_hashes_are_quoted_and_never_hold_a_slash(result):
    request = replace(result.request, loras=(Lora(r"C:\styles\big, ink: v2.safetensors"), Lora("a/b/owl")))
    text = infotext.write(request, result.receipts, (48, 32))
    assert f'Lora hashes: "big_ ink_ v2: {"a" * 12}, owl: {"b" * 12}"' in text
    assert "\\" not in text.split("\n")[0].partition(" <lora")[2]
    assert len(reader.tags(reader.parameters(text)["Prompt"])) == 2


@pytest.mark.parametrize("prompt", [
    "a fox", "", "one, two: three, \"four\"", "lines\nof\nwords", "Steps: 3, Sampler: x, Seed: 1 is a prompt\nhere",
    "ends with a comma,", "日本語 and é", "100% (very:1.3) [a|b]", "<b>bold</b>"])
def test_what_is_written_is_read_back(prompt, result):
    request = replace(result.request.alone(0), prompt=prompt, size=(48, 32), options={},
                      loras=(Lora("ink", weight=0.8), Lora("owl", weight=1.2, text_weight=0.5)))
    reading = infotext.read(infotext.write(request, result.receipts, (48, 32)))
    assert reading.request == request
    assert reading.model == "pocket"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "default"])
def test_every_sampler_is_read_back(name):
    text = infotext.write(Request(prompt="a", sampler=name), [], (8, 8))
    assert infotext.read(text).request.sampler == name


A1111 = """masterpiece, 1girl <lora:styles_ink:0.7>, (red hair:1.2) <lora:owl>
BREAK on the moon
Negative prompt: lowres, bad hands
Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 512x768, \
Model hash: abcdef1234, Model: dream_8, Clip skip: 2, Lora hashes: "styles_ink: 0123456789ab", \
Hires prompt: "a, b: \\"c\\"", Version: v1.10.1"""


def test_a_picture_of_a1111():
    reading = infotext.read(A1111)
    request = reading.request
    assert request.prompt == "masterpiece, 1girl, (red hair:1.2)\nBREAK on the moon"
    assert request.negative == "lowres, bad hands"
    assert request.loras == (Lora("styles_ink", weight=0.7), Lora("owl"))
    assert (request.steps, request.sampler, request.guidance, request.seed, request.size) == (
        30, "dpm++2m-karras", 6.5, 1234567890, (512, 768))
    assert reading.model == "dream_8"
    said = " / ".join(reading.remarks)
    for lost in ("Clip skip", "Hires prompt", "plain words"):
        assert lost in said
    assert "Version" not in said


@pytest.mark.parametrize(("tag", "weight", "text_weight"), [
    ("owl", 1.0, None), ("owl:0.5", 0.5, None), ("owl:0.2:0.6", 0.6, 0.2), ("owl:0.6:0.6", 0.6, None),
    ("owl:unet=0.4", 0.4, 1.0), ("owl:te=0.1:unet=0.4", 0.4, 0.1), ("owl:te=0.1", 0.1, None)])
def test_the_forms_of_a_tag(tag, weight, text_weight):
    reading = infotext.read(f"a <lora:{tag}>\nSteps: 5, Seed: 1, CFG scale: 2")
    assert reading.request.loras == (Lora("owl", weight=weight, text_weight=text_weight),)


def test_what_cannot_be_read_is_said():
    reading = infotext.read(
        "a <lora:owl:x> <lora:fox:1:1:16>\nSteps: many, Sampler: Magic, CFG scale: 7, Seed: 3, Size: big")
    said = " / ".join(reading.remarks)
    for lost in ("many", "Magic", "big", "'x'", "'16'"):
        assert lost in said
    assert reading.request.sampler == "default"
    assert reading.request.guidance == 7


@pytest.mark.parametrize("text", ["", "a fox", "a fox\nSteps: 20, Seed: 1", "a\nSteps: 0, Seed: 1, CFG scale: 2",
                                  "a <lora:owl:99>\nSteps: 5, Seed: 1, CFG scale: 2"])
def test_refused(text):
    with pytest.raises(Refused):
        infotext.read(text)
