"""`medley batch` on a toy: a manifest's pictures in a folder, one bad line its own trouble, the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from composition import record


def row(prompt, *loras, **more):
    return {"prompt": prompt, "loras": [{"source": name} for name in loras], "steps": 2, "sampler": "euler", **more}


def write(tmp_path, *rows):
    (tmp_path / "m.jsonl").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))


@pytest.fixture
def batch(medley, toy, tmp_path):
    def call(*more, out="out"):
        return medley("batch", "m.jsonl", "--out", out, "--model", toy.model, "--lora-dir", toy.loras, *more)

    return call


def there(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "pictures").glob("*.png")}


def test_end_to_end(batch, toy, tmp_path):
    write(tmp_path, row("a fox", "fox", seed=3), row("an owl and a fox", "owl", "fox", method="composite"), row("nothing", count=2))
    said = batch("--json")
    assert said.code == 0, said.err
    assert (said.json["pictures"], said.json["made_now"], said.json["failed"]) == (4, 4, 0)
    assert [entry["line"] for entry in said.json["rows"]] == [1, 2, 3, 3]
    requests = [record.read(tmp_path / entry["file"]) for entry in said.json["rows"]]
    assert [(request.prompt, request.seed, request.method) for request in requests] == [
        ("a fox", 3, "merge"), ("an owl and a fox", 0, "composite"), ("nothing", 0, "merge"), ("nothing", 1, "merge")]
    assert {request.model for request in requests} == {f"{toy.model.name}/"} and requests[0].guidance is not None
    assert set(there(tmp_path / "out")) == {Path(entry["file"]).name for entry in said.json["rows"]}
    assert all(entry["seconds"] > 0 and entry["evaluations"] for entry in said.json["rows"])
    assert "making: 4 of 4 pictures" in said.err


def test_a_picture_is_what_generate_makes(batch, medley, toy, tmp_path):
    write(tmp_path, row("a fox", "fox", seed=3))
    made = batch("--json").json["rows"][0]["file"]
    assert medley("generate", "a fox", "--lora", "fox", "--steps", 2, "--sampler", "euler", "--seed", 3, "--model", toy.model, "--lora-dir",
                  toy.loras).code == 0
    assert Path(made).read_bytes() == Path("pictures/0000.png").read_bytes()


def test_one_bad_lora_among_three_rows(batch, toy, tmp_path):
    """Exit code 3, the other two are made, and the same command tries the failed one again."""
    write(tmp_path, row("a fox", "fox"), row("a bad one", "bad"), row("an owl", "owl"))
    (tmp_path / "more").mkdir()
    (tmp_path / "more/bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a safetensors")
    said = batch("--lora-dir", tmp_path / "more")
    assert said.code == 3
    assert "line 2: " in said.err and "bad" in said.err and "line 1" not in said.err and "1 of 3 lines failed" in said.out
    before = there(tmp_path / "out")
    assert len(before) == 2
    said = batch("--lora-dir", tmp_path / "more", "--json")
    assert said.code == 3 and said.json["made_now"] == 0 and said.json["failed"] == 1 and there(tmp_path / "out") == before
    (tmp_path / "more/bad.safetensors").write_bytes((toy.loras / "ink.safetensors").read_bytes())
    said = batch("--lora-dir", tmp_path / "more", "--json")
    assert said.code == 0 and [entry["made_now"] for entry in said.json["rows"]] == [False, True, False]
    assert before.items() <= there(tmp_path / "out").items()


def test_a_lora_that_does_not_fit_fails_its_row(batch, tmp_path):
    (tmp_path / "more").mkdir()
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(4, 8), "unet.nowhere.lora_B.weight": torch.zeros(8, 4)}, tmp_path / "more/odd.safetensors")
    write(tmp_path, row("a", "fox"), row("b", "odd"), row("c", "fox"))
    said = batch("--lora-dir", tmp_path / "more", "--json")
    assert said.code == 3 and [bool(entry["file"]) for entry in said.json["rows"]] == [True, False, True]
    assert "odd" in said.json["rows"][1]["error"]


def test_bad_lines_are_named_and_cost_no_other(batch, tmp_path):
    write(tmp_path, row("a"), "", "{", row("b", steps=0), row("c", method="mergee"), row("d", colour=1), row("e", options={"tau": "x"}, method="switch"))
    said = batch("--json")
    assert said.code == 3 and said.json["pictures"] == 1
    errors = {entry["line"]: entry["error"] for entry in said.json["rows"]}
    for number, words in ((3, "JSON"), (4, "steps"), (5, "mergee"), (6, "colour"), (7, "tau")):
        assert words in errors[number] and f"line {number}: " in said.err
    assert errors[1] == ""


def test_two_equal_rows_make_one_picture(batch, tmp_path):
    write(tmp_path, row("a", "fox"), row("a", "fox"))
    said = batch("--json").json
    assert said["pictures"] == said["made_now"] == len(there(tmp_path / "out")) == 1
    assert said["rows"][0]["file"] == said["rows"][1]["file"]


def test_limit(batch, tmp_path):
    write(tmp_path, *(row(prompt) for prompt in "abc"))
    assert batch("--limit", 2, "--json").json["made_now"] == 2
    assert batch("--json").json["made_now"] == 1
    assert "3 pictures in out/pictures: 0 made now" in batch().out


def test_lines_of_several_models_and_one_that_cannot_be_opened(batch, toy, tmp_path):
    write(tmp_path, row("a", model="pocket"), row("b"), row("c", model="pockett"), row("d", model=str(toy.model)))
    said = batch("--json")
    assert said.code == 3 and "line 3: there is no model 'pockett'" in said.err
    assert [entry["line"] for entry in said.json["rows"]] == [1, 2, 3, 4]
    models = [record.read(tmp_path / entry["file"]).model for entry in said.json["rows"] if entry["file"]]
    assert models == ["pocket", f"{toy.model.name}/", f"{toy.model.name}/"]  # without its path


def test_the_folder_is_a_manifest_for_evaluate_and_for_batch(batch, medley, toy, tmp_path):
    write(tmp_path, row("foxword", "fox"), row("owlword", "owl"))
    assert batch().code == 0
    said = medley("evaluate", "out/pictures", "--model", toy.model, "--lora-dir", toy.loras, "--references", 0, "--report", "r")
    assert said.code == 0, said.err
    (tmp_path / "m.jsonl").write_text((tmp_path / "out/pictures/metadata.jsonl").read_text())
    assert batch("--json").json["made_now"] == 0


@pytest.mark.parametrize("arguments, says", [
    (("none.jsonl",), "none.jsonl is not there"), (("empty.jsonl",), "empty"), (("m.jsonl", "--out", "m.jsonl"), "is a file"),
    (("m.jsonl", "--limit", 0), "limit"), (("m.jsonl", "--lora-dir", "nowhere"), "nowhere"), (("m.jsonl", "--model", "pockett"), "pocket"),
    (("m.jsonl", "--device", "abacus"), "abacus"),
])
def test_what_cannot_be_is_refused_before_anything_is_made(medley, tmp_path, arguments, says):
    write(tmp_path, row("a"))
    (tmp_path / "empty.jsonl").write_text("\n")
    said = medley("batch", *arguments)
    assert said.code == 2 and says in said.err, said.err
    assert not (tmp_path / "batch").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.slow
def test_ctrl_c_and_kill_and_then_the_rest(batch, toy, tmp_path):
    write(tmp_path, *(row("a fox", "fox", seed=seed, steps=20) for seed in range(12)))
    call = [sys.executable, "-m", "app.cli", "batch", "m.jsonl", "--out", "out", "--model", toy.model, "--lora-dir", toy.loras]
    for send, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = len(there(tmp_path / "out"))
        process = subprocess.Popen(list(map(str, call)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path,
                                   env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])})
        until = time.monotonic() + 120
        while len(there(tmp_path / "out")) < before + 2:
            assert process.poll() is None and time.monotonic() < until, "it ended before it could be stopped"
            time.sleep(0.002)
        process.send_signal(send)
        assert process.wait() == code
    left = there(tmp_path / "out")
    assert 4 <= len(left) < 12
    said = batch("--json")
    assert said.code == 0 and said.json["made_now"] == 12 - len(left) and left.items() <= there(tmp_path / "out").items()
    assert not list((tmp_path / "out/pictures").glob(".*"))
