"""One bad item never ends an evaluation, and two evaluations never share a folder: rows of their own with the reason, exit code 3."""

import json
import os

import pytest
from PIL import Image

from app.evaluation import mllm, report
from composition import Refused, lock
from composition.profiles.store import ProfileStore, _file_name
from retrieval.judge import Judge
from tests.app.evaluation.conftest import rows

LONG = "x" * 5000


@pytest.fixture
def manifest(tmp_path):
    """Writes m.jsonl of one good picture and these lines besides."""
    Image.new("RGB", (40, 32), "red").save(tmp_path / "good.png")

    def write(*lines):
        good = {"file_name": "good.png", "text": "a fox", "concepts": ["a fox"]}
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [good, *lines])))

    return write


def bad_lines(folder):
    """Lines that are wrong in all kinds of ways, each with a word of the reason."""
    Image.new("RGB", (1, 900), "red").save(folder / "narrow.png")
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (30, 30)).save(folder / "torn.png")
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[:60])
    (folder / "folder.png").mkdir()
    return [
        ({"file_name": f"{LONG}.png", "text": "a fox"}, "is missing"),
        ({"file_name": "a\0b.png", "text": "a fox"}, "has a NUL"),
        ({"file_name": "text.png", "text": "a fox"}, "no readable picture"),
        ({"file_name": "torn.png", "text": "a fox"}, "no readable picture"),
        ({"file_name": "folder.png", "text": "a fox"}, "missing"),
        ({"file_name": "good.png", "text": "a \ud800 fox"}, "half a letter"),
        ({"file_name": "good.png", "text": "a fox", "concepts": ["a \udfff"]}, "half a letter"),
        ({"file_name": "good.png", "text": "a fox", "group": "\ud900"}, "half a letter"),
        ({"file_name": "good.png", "text": "a fox", "method": "\ud900"}, "half a letter"),
        ({"file_name": "good.png", "text": "a fox", "concepts": [{"phrase": "a fox", "references": [f"{LONG}.png"]}]}, "is missing"),
        ({"file_name": "good.png", "text": "a fox", "concepts": [{"phrase": "an owl", "references": ["text.png"]}]}, "reference of an owl"),
        ({"file_name": "good.png", "text": 7}, "a text is needed"),
    ]


def test_every_bad_line_is_a_row_of_its_own(medley, manifest, tmp_path):
    bad = bad_lines(tmp_path)
    manifest(*(line for line, _ in bad), {"file_name": "narrow.png", "text": LONG, "concepts": [LONG, "an owl"], "group": LONG, "method": LONG})
    said = medley("evaluate", "m.jsonl", "--report", "r")
    assert said.code == 3, said.err
    for _, words in bad:
        assert words in said.err, words
    scored = rows(tmp_path / "r")
    assert [row["line"] for row in scored if row["text"] == "a fox"][0] == 1 and any(row["text"] == LONG for row in scored)
    problems = json.loads((tmp_path / "r/summary.json").read_text())["problems"]
    assert len(problems) >= len(bad) - 2 and max(map(len, problems)) < 1000  # equal reasons are told together
    assert (tmp_path / "r/index.html").is_file() and not list((tmp_path / "r").glob(".*"))


@pytest.mark.parametrize("part", ["see", "read", "cut"])
def test_what_the_judge_chokes_on_costs_that_picture_alone(medley, manifest, tmp_path, monkeypatch, part):
    Image.new("RGB", (40, 32), "blue").save(tmp_path / "bad.png")
    manifest({"file_name": "bad.png", "text": "a bad fox", "concepts": ["a bad owl"]})
    honest = getattr(Judge, part)

    def choking(self, items):
        if any(item.getpixel((0, 0))[2] > 200 if isinstance(item, Image.Image) else "bad" in item for item in items):
            raise RuntimeError("out of memory")
        return honest(self, items)

    monkeypatch.setattr(Judge, part, choking)
    said = medley("evaluate", "m.jsonl", "--report", "r")
    assert said.code == 3 and "bad.png could not be judged: unexpected RuntimeError: out of memory" in said.err
    assert [row["text"] for row in rows(tmp_path / "r")] == ["a fox"]


def test_a_lora_with_a_name_of_5000_letters_costs_its_own_sets(medley, toy, tmp_path):
    entry = lambda name: {"id": name, "name": name, "trigger": [f"{name[:9]}word"]}  # noqa: E731
    bed = {"character": [entry("fox"), entry(LONG), entry("a\u2028b")], "style": [entry("ink")]}
    (tmp_path / "bed.json").write_text(json.dumps(bed))
    said = medley("evaluate", "--testbed", "bed.json", "--model", toy.model, "--lora-dir", toy.loras, "--steps", 1, "--loras", 2, "--seeds", 1,
                  "--methods", "merge", "--tune", "none", "--references", 0, "--resamples", 100, "--report", "r")
    assert said.code == 3, said.err
    assert {row["group"] for row in rows(tmp_path / "r")} == {"fox+ink"}
    assert said.err.count("left out") >= 2 and max(map(len, said.err.splitlines())) < 6000


def test_a_second_opinion_that_breaks_costs_no_report(medley, tmp_path, monkeypatch):
    Image.new("RGB", (40, 32), "red").save(tmp_path / "good.png")
    lines = [{"file_name": "good.png", "text": "a fox", "method": method} for method in ("one", "two")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(mllm.Endpoint, "better", lambda *_: (_ for _ in ()).throw(KeyError("choices")))
    said = medley("evaluate", "m.jsonl", "--mllm", "http://localhost:1/v1", "--mllm-model", "m", "--report", "r")
    assert said.code == 3 and "the second opinion" in said.err and len(rows(tmp_path / "r")) == 2


def test_the_same_folder_twice_is_refused_and_left_alone(medley, manifest, tmp_path):
    manifest()
    assert medley("evaluate", "m.jsonl", "--report", "r").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    with lock.alone(tmp_path / "r/.evaluation.lock", "x"):
        said = medley("evaluate", "m.jsonl", "--report", "r")
    assert said.code == 2 and f"another evaluation is at work in r (process {os.getpid()})" in said.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_what_a_killed_one_left_is_cleaned(medley, manifest, tmp_path):
    manifest()
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.0123456789abcdef.html.tmp").write_text("half a pa")
    (tmp_path / "r/.evaluation.lock").write_text("process 999999999 on elsewhere\n")
    assert medley("evaluate", "m.jsonl", "--report", "r").code == 0
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(report.FILES)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
def test_a_bar_that_is_no_number_is_refused(medley, manifest, value):
    manifest()
    said = medley("evaluate", "m.jsonl", "--fail-below", f"clipscore={value}", "--report", "r")
    assert said.code == 2 and "--fail-below" in said.err and value in said.err


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"name": 1}', b""])
def test_a_damaged_profile_is_named_by_its_file(tmp_path, content):
    file = tmp_path / _file_name("a" * 64, "toy")
    file.write_bytes(content)
    with pytest.raises(Refused, match=rf"{file.name}.*--again"):
        ProfileStore(tmp_path).frequency("a" * 64, "toy")
