"""What other tools read of our pictures, and what we read of theirs."""

import time
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
    for lost in ("Clip skip", "Hires prompt"):
        assert lost in said
    assert "Version" not in said and "plain words" not in said


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


# what other tools write

FORGE = """a raccoon <lora:raccoon:0.9>
Steps: 6, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 77, Size: 64x64, \
Model: flux1-dev-bnb-nf4-v2, Version: f2.0.1"""


def test_cfg_and_distilled_guidance_are_two_quantities():
    reading = infotext.read(FORGE)
    assert (reading.request.guidance, reading.request.true_guidance, reading.request.sampler) == (3.5, 1.0, "default")
    assert reading.remarks == ()
    request = infotext.read(FORGE.replace("CFG scale: 1,", "CFG scale: 4.5,")).request
    assert (request.guidance, request.true_guidance) == (3.5, 4.5)
    below = infotext.read(FORGE.replace("CFG scale: 1,", "CFG scale: 0.5,"))
    assert below.request.true_guidance == 1 and "0.5" in below.remarks[0]


@pytest.mark.parametrize(("request_", "distilled", "pairs"), [
    (Request(prompt="a", model="flux-dev", guidance=3.5), None, {"CFG scale": "1", "Distilled CFG Scale": "3.5"}),
    (Request(prompt="a", model="tuned", guidance=3.5, true_guidance=4), None, {"CFG scale": "4", "Distilled CFG Scale": "3.5"}),
    (Request(prompt="a", model="tuned", guidance=3.5), True, {"CFG scale": "1", "Distilled CFG Scale": "3.5"}),
    (Request(prompt="a", model="pocket-flux", guidance=4.5), None, {"CFG scale": "4.5"}),
    (Request(prompt="a", model="flux-dev", guidance=4.5), False, {"CFG scale": "4.5"}),
    (Request(prompt="a", guidance=7), None, {"CFG scale": "7"}),
])  # fmt: skip
def test_guidance_is_written_as_what_it_is(request_, distilled, pairs):
    text = infotext.write(request_, [], (8, 8), "Euler Simple", distilled=distilled)
    read = reader.parameters(text)
    assert {key: value for key, value in read.items() if "CFG" in key} == pairs
    assert (read["Sampler"], read["Schedule type"]) == ("Euler", "Simple")
    back = infotext.read(text).request
    assert (back.guidance, back.true_guidance) == (request_.guidance, request_.true_guidance)


@pytest.mark.parametrize(("sampler", "name", "said"), [
    ("Sampler: Euler, Schedule type: Simple", "euler", "Simple"), ("Sampler: DPM++ 2M, Schedule type: Exponential", "dpm++2m", "Exponential"),
    ("Sampler: Euler a, Schedule type: Automatic", "euler-a", ""), ("Sampler: DPM++ 2M Karras", "dpm++2m-karras", ""),
    ("Sampler: Restart", "default", "Restart")])
def test_samplers_and_schedules(sampler, name, said):
    reading = infotext.read(f"a\nSteps: 5, {sampler}, Seed: 1, CFG scale: 2")
    assert reading.request.sampler == name
    assert said in " ".join(reading.remarks) and bool(said) == bool(reading.remarks)


SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64"


@pytest.mark.parametrize(("text", "prompt", "negative"), [
    (f"a fox\nNegative prompt: bad\n{SETTINGS}\nTemplate: a {{fox|owl}}\nNegative Template: bad", "a fox", "bad"),
    (f"a fox\r\nNegative prompt: bad\r\n{SETTINGS}\r\n", "a fox", "bad"),
    (f"a fox Negative prompt: bad {SETTINGS}", "a fox", "bad"),
    (f"a fox\n{SETTINGS}\nNegative prompt: bad, worse", "a fox", "bad, worse"),
    (f"{SETTINGS}", "", ""),
    (f"Steps: 3, Sampler: x, Seed: 9 is how it began\n{SETTINGS}", "Steps: 3, Sampler: x, Seed: 9 is how it began", ""),
    (f"a fox\n{SETTINGS}\nCivitai resources: [{{\"type\":\"checkpoint\",\"modelVersionId\":1}}]", "a fox", ""),
])  # fmt: skip
def test_the_settings_line_is_found_anywhere(text, prompt, negative):
    request = infotext.read(text).request
    assert (request.prompt, request.negative, request.steps, request.seed) == (prompt, negative, 20, 5)


def test_json_is_read_whole_and_lost_loras_are_named_first():
    reading = infotext.read(f"a fox [small:big:9]\n{SETTINGS}, Clip skip: 2, Created Date: 2025-01-01T10:00:00Z, "
                            'Civitai resources: [{"type":"checkpoint","modelVersionId":290640,"modelName":"Pony, V6: XL"},'
                            '{"type":"lora","weight":0.8,"modelVersionId":12,"modelName":"Ink, Style","modelVersionName":"v2"},'
                            '{"type":"embed","modelName":"Bad Hands"}], Civitai metadata: {"a": {"b": [1, 2]}}, '
                            'Hashes: {"model": "0123456789", "lora:owl": "89abcdef01", "embed:easy": "11"}, Version: v1')
    assert reading.request.loras == ()
    assert "owl" in reading.remarks[0] and "Ink, Style v2" in reading.remarks[1] and "0.8" in reading.remarks[1]
    said = " / ".join(reading.remarks)
    for lost in ("Bad Hands", "easy", "Clip skip: 2", "[small:big:9]"):
        assert lost in said
    for noise in ("Civitai metadata", "Created Date", "modelVersionId", "Pony"):
        assert noise not in said


def test_hashes_are_those_of_the_tagged_loras():
    reading = infotext.read(f'a <lora:owl:0.5> <lora:big ink:1>\n{SETTINGS}, Lora hashes: "owl: 0123456789AB, big ink: cafe00000000"')
    assert reading.hashes == {"owl": "0123456789ab", "big ink": "cafe00000000"} and reading.remarks == ()


@pytest.mark.parametrize(("seed", "read"), [(2**64 - 1, 2**64 - 1), (2**63 + 5, 2**63 + 5), (-2, 2**64 - 2)])
def test_seeds_of_64_bits(seed, read):
    assert infotext.read(f"a\nSteps: 5, Seed: {seed}, CFG scale: 2").request.seed == read


@pytest.mark.parametrize("seed", [-1, 2**64, "x"])
def test_a_seed_that_is_none_is_said(seed):
    assert "Seed" in " ".join(infotext.read(f"a\nSteps: 5, Seed: {seed}, CFG scale: 2").remarks)


def test_a_record_names_no_lora_that_was_not_used():
    text = infotext.write(Request(prompt="a fox <lora:owl:1>", steps=5), [], (8, 8))
    assert "lora" not in text


@pytest.mark.parametrize("part", ["a", "a:", "a: ", 'a: "', 'a: "b, ', "a: {", "a: [1, ", "a: [", "Steps: 1, ", "\n", "\\", " ", "<lora:", "(",
                                  "[:", 'a: "\\', "Negative prompt:", "Steps: "])
def test_time_is_linear_in_the_text(part):
    def seconds(count: int) -> float:
        begun = time.perf_counter()
        try:
            infotext.read(f"a\n{part * count}\n{SETTINGS}, x: {part * count}")
        except Refused:
            pass
        return time.perf_counter() - begun

    assert seconds(80_000) < 10 * seconds(20_000) + 0.5
