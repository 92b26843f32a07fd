"""`medley profile` and what follows from it: kept by the tensors, drawn, pinned into the request, told in the output."""

import json
from pathlib import Path

import pytest
from PIL import Image

from composition import record
from composition.profiles.frequency import Profile
from composition.profiles.store import ProfileStore


@pytest.fixture
def measured(medley, toy):
    """`medley profile` of the toy's LoRAs, four steps."""

    def call(*more, names=("fox", "owl", "ink")):
        return medley("profile", *names, "--model", toy.model, "--lora-dir", toy.loras, "--steps", 4, "--seeds", 1, *more)

    return call


def test_it_measures_once_prints_numbers_and_draws_a_plot(measured, tmp_path):
    first = measured()
    assert first.code == 0, first.err
    assert first.out.count("measured now") == 3 and "profile-0000.png" in first.out
    assert len(list((tmp_path / "home/profiles").glob("*.json"))) == 3
    again = measured()
    assert again.out.count("kept") == 3 and "measured now" not in again.out
    assert measured("--again").out.count("measured now") == 3
    assert measured("--prompt", "a tree").out.count("measured now") == 3
    plot = Image.open(tmp_path / "pictures/profile-0000.png")
    assert plot.width > 600 and len(plot.convert("RGB").getcolors(1 << 20)) > 10


def test_json(measured):
    said = measured("--json").json
    assert set(said["order"]) == {"fox", "owl", "ink"} and len(said["profiles"]) == 3
    values = {one["name"]: one["change"] for one in said["profiles"]}
    assert said["order"] == sorted(values, key=lambda name: -values[name])


def test_cmlora_takes_the_measured_order_and_the_record_has_it(measured, medley, toy, tmp_path):
    generate = ("generate", "fox and owl", "--model", toy.model, "--lora-dir", toy.loras, "--lora", "fox", "--lora", "owl",
                "--lora", "ink", "--method", "cmlora", "--steps", 6, "--seed", 1)  # fmt: skip
    before = medley(*generate)
    assert before.code == 0, before.err
    assert "order by category: fox, owl, ink are not profiled" in before.out and f"medley profile fox owl ink --model {toy.model}" in before.out
    order = measured("--json").json["order"]
    after = medley(*generate)
    assert f"order by measured change of frequency: {', '.join(order)}" in after.out
    made = record.read(tmp_path / "pictures/0001.png")
    assert made.options["order"] == ",".join(order)
    assert medley("generate", "--from", "pictures/0001.png", "--model", toy.model, "--lora-dir", toy.loras, "--out", "again").code == 0
    assert Path("again/0000.png").read_bytes() == Path("pictures/0001.png").read_bytes()
    pinned = medley(*generate, "--option", f"order={order[2]}")
    assert "measured" not in pinned.out
    assert record.read(tmp_path / "pictures/0002.png").options == {"order": order[2]}


def test_who_led_when_is_told(medley, toy):
    said = medley("generate", "fox and owl", "--model", toy.model, "--lora-dir", toy.loras, "--lora", "fox", "--lora", "owl",
                  "--method", "cmlora", "--steps", 8, "--seed", 1)
    lines = {line.split()[0]: line.split()[1] for line in said.out.splitlines() if line[:5] in ("phase", "fox  ", "owl  ")}
    assert set(lines["phase"]) == {"e"} and len(lines["phase"]) == len(lines["fox"]) >= 8 and lines["fox"][0] == "#" and set(lines["fox"] + lines["owl"]) <= set("#+.")


def test_an_order_that_was_asked_for_and_not_measured_is_refused(medley, toy):
    said = medley("generate", "x", "--model", toy.model, "--lora-dir", toy.loras, "--lora", "fox", "--lora", "owl", "--method", "cmlora",
                  "--option", "order=level", "--steps", 2)
    assert said.code == 2 and "not profiled" in said.err and "medley profile fox" in said.err


def test_bad_input(measured):
    assert "did you mean 'fox'" in measured(names=("foxx",)).err
    assert measured(names=("fox", "fox")).code == 2


def test_a_profile_of_other_tensors_is_not_taken(tmp_path):
    profiles = ProfileStore(tmp_path)
    one = Profile("fox", "a" * 64, "pocket", "fox", 4, 1, (0.1,) * 4, (0.2,) * 4, 0.5)
    profiles.keep(one)
    assert profiles.frequency("a" * 64, "pocket") == one
    assert profiles.frequency("b" * 64, "pocket") is None and profiles.frequency("a" * 64, "other") is None
    assert profiles.frequency("a" * 20 + "b" * 44, "pocket") is None  # the same first letters


@pytest.mark.parametrize("model", ["pocket", "pocket-flux"])
def test_every_bundled_lora_is_profiled(model):
    from composition.loras import library, reader

    profiles = ProfileStore()
    for path in library.files(model):
        found = profiles.frequency(reader.inspect(path).tensor_sha256, model)
        assert found is not None and len(found.high) == found.steps == 50, path.stem


def test_variants_of_an_evaluation_carry_their_options_and_it_says_which_order_was_used(medley, toy, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"character": [{"id": "fox", "trigger": ["foxword"]}], "style": [{"id": "ink", "trigger": ["ink"]}]}))
    said = medley("evaluate", "--testbed", "m.json", "--model", toy.model, "--lora-dir", toy.loras, "--steps", 2, "--loras", "2", "--seeds", 1,
                  "--methods", "cmlora,cmlora:cache=false:decay=false", "--tune", "none", "--references", 0, "--no-equal", "--report", "r")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in (tmp_path / "r/scores.jsonl").read_text().splitlines()]
    assert {row["variant"]: row["request"]["options"] for row in rows} == {
        "none": {}, "cmlora": {"order": "category"}, "cmlora:cache=false:decay=false": {"order": "category", "cache": False, "decay": False}}
    assert "CMLoRA cache=false decay=false" in (tmp_path / "r/index.html").read_text()
    assert "CMLoRA: LoRAs ordered by category, as not all are profiled on this model." in said.out


def test_an_evaluation_takes_the_measured_order_unless_told_to_go_by_category(measured, medley, toy, tmp_path):
    order = measured("--json").json["order"]
    (tmp_path / "m.json").write_text(json.dumps({"character": [{"id": "fox", "trigger": ["foxword"]}], "style": [{"id": "ink", "trigger": ["ink"]}]}))
    said = medley("evaluate", "--testbed", "m.json", "--model", toy.model, "--lora-dir", toy.loras, "--steps", 2, "--loras", "2", "--seeds", 1,
                  "--methods", "merge,cmlora,cmlora:order=level,cmlora:order=category,switch-a:order=ink", "--tune", "none", "--references", 0,
                  "--no-equal", "--report", "r")
    assert said.code == 0, said.err
    rows = {row["variant"]: row for row in map(json.loads, (tmp_path / "r/scores.jsonl").read_text().splitlines())}
    assert rows["cmlora"]["request"]["options"]["order"] == ",".join(name for name in order if name != "owl")
    assert rows["cmlora:order=category"]["request"]["options"] == {"order": "category"}
    assert record.details(tmp_path / "r" / rows["cmlora:order=category"]["picture"]).notes["cmlora"]["high"] == ["fox", "ink"]
    for line in ("CMLoRA: LoRAs ordered by the measured change of frequency.", "CMLoRA order=level: LoRAs ordered by the measured level of frequency.",
                 "CMLoRA order=category: LoRAs ordered by category.", "Switch-A order=ink: LoRAs ordered as the option says."):
        assert line in said.out and line in (tmp_path / "r/index.html").read_text()
    assert "Merge: LoRAs ordered" not in said.out


def test_an_order_that_was_not_measured_costs_its_own_pictures(medley, toy, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"character": [{"id": "fox", "trigger": ["foxword"]}], "style": [{"id": "ink", "trigger": ["ink"]}]}))
    said = medley("evaluate", "--testbed", "m.json", "--model", toy.model, "--lora-dir", toy.loras, "--steps", 2, "--loras", "2", "--seeds", 1,
                  "--methods", "merge,cmlora:order=change", "--tune", "none", "--references", 0, "--report", "r")
    assert said.code == 3 and "cmlora:order=change of fox+ink: option order=change: fox, ink are not profiled" in said.err
    assert {json.loads(line)["variant"] for line in (tmp_path / "r/scores.jsonl").read_text().splitlines()} == {"none", "merge"}


def test_behaviour_is_measured_once_and_said_in_words(medley, toy, tmp_path):
    flags = ("profile", "fox", "owl", "--behaviour", "--model", toy.model, "--lora-dir", toy.loras, "--steps", 4, "--seeds", 1)
    first = medley(*flags)
    assert first.code == 0, first.err
    assert first.out.count("measured now") == 2 and first.out.count("steady") >= 2 and not (tmp_path / "pictures").exists()
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "home/profiles").glob("*.behaviour.json")}
    assert len(files) == 2
    rows = medley(*flags, "--json").json["behaviours"]
    assert [row["name"] for row in rows] == ["fox", "owl"] and all(len(row["direction"]) == 256 and row["probe"]["steps"] == 4 for row in rows)
    assert files == {file: file.stat().st_mtime_ns for file in files}  # kept, not measured again
    refused = medley(*flags, "--prompt", "a fox")
    assert refused.code == 2 and "--prompt" in refused.err
