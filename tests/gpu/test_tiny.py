"""The command for the GPU in small, on the processor: it measures what it says, without what the page and the suite are made of, and what
fails in it fails alone."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from composition import methods
from tests.gpu import table
from tests.gpu.__main__ import GRACE, run
from tests.gpu.plan import PARTS, limits
from tests.gpu.report import Broken, Report, read

ROOT = Path(__file__).parents[2]
# Not on the machine that the command is for: what the page, the command line, the judge and the suite need.
ABSENT = ("platformdirs", "gradio", "typer", "open_clip", "jinja2", "rich", "pytest", "beartype", "playwright", "torchmetrics", "gguf")
TOGETHER = """
import importlib, sys, time
from pathlib import Path
from tests.gpu.chapter import Setting
from tests.gpu.plan import PARTS
from tests.gpu.report import Report

for part in "abcdf":
    for name, (module, _) in PARTS[part].chapters.items():
        report = Report(Path(sys.argv[1]) / f"{part}-{name}.json", time.time() + 300)
        importlib.import_module(f"tests.gpu.{module}").measure(Setting("cpu", True, 2), report)
        report.save()
"""


def surroundings(folder):
    """An environment in which the absent packages cannot be imported, in any Python that is started there."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def chapters(tmp_path_factory):
    """Chapters of parts a to d and f by name, all measured in one process: loading torch for each would take most of the time."""
    folder = tmp_path_factory.mktemp("gpu")
    subprocess.run([sys.executable, "-c", TOGETHER, str(folder)], check=True, cwd=ROOT, env=surroundings(folder))
    return {file.stem: read(file) for file in folder.glob("*.json")}


def columns(chapter, name):
    return {row: values[name] for row, values in chapter["rows"].items() if name in values}


@pytest.mark.slow
def test_nothing_fails_and_every_number_is_one(chapters):
    assert set(chapters) == {f"{part}-{name}" for part in "abcdf" for name in PARTS[part].chapters}
    for name, chapter in chapters.items():
        assert not chapter["errors"] and not chapter["skipped"], (name, chapter["errors"], chapter["skipped"])
        assert chapter["machine"]["torch"] and chapter["rows"], name
        for row, values in chapter["rows"].items():
            assert all(value is None or value == "equal" or math.isfinite(value) for value in values.values()), (name, row, values)


@pytest.mark.slow
def test_every_method_is_compared_with_the_processor(chapters):
    decibels = columns(chapters["a-methods"], "bf16 dB")
    assert {f"pocket {name}" for name in methods.all()} <= set(decibels)
    hard = {f"pocket {name}" for name in ("topk", "ranks", "entropy")}  # which LoRAs or ranks a token takes flips where two are close
    low = {name: value for name, value in decibels.items() if value <= (10 if name in hard else 25)}
    assert not low, "bfloat16 makes the same picture, with some noise"
    assert any(value != "equal" and value < 60 for value in decibels.values()), "bfloat16 was not what was compared"


@pytest.mark.slow
def test_the_same_twice_is_equal_where_nothing_is_offloaded(chapters):
    """As pictures under offloading must be on a GPU."""
    again = columns(chapters["a-offloading"], "none again dB")
    assert set(again.values()) == {"equal"} and len(again) == 8


@pytest.mark.slow
def test_all_forms_of_loras_agree_at_the_size_and_change_the_output(chapters):
    rows = chapters["b-eager"]["rows"]
    for size in ("toy SD", "toy SDXL", "toy FLUX"):
        for form in ("live", "folded", "one-hot rows"):
            values = rows[f"{size} K = 2 {form}"]
            assert values["gap"] < 0.5 * values["change"], (size, form, values)
        assert rows[f"{size} K = 2 stock PEFT"]["change"] > 0 == rows[f"{size} K = 2 none live"]["change"]
        assert rows[f"{size} K = 2 one-hot rows"]["rows"] == 2 * rows[f"{size} K = 2 live"]["rows"]


@pytest.mark.slow
def test_compiled_blocks_see_the_loras(chapters):
    for row, values in chapters["b-compiled"]["rows"].items():
        assert values["graphs"] >= 1 and values["breaks"] == 0, (row, values)
        assert values["gap"] < 0.02 and (values["changed"] is None or values["changed"] > 0.005), (row, values)


@pytest.mark.slow
def test_steps_and_training_have_their_ratios(chapters):
    steps = columns(chapters["c-steps"], "over merge")
    assert {row.rpartition(" ")[2] for row in steps} == {"merge", "live", "composite", "cmlora", "clora-fast"}
    assert steps["pocket merge"] == 1.0 < steps["pocket composite"], "three evaluations a step, and one"
    trained = columns(chapters["d-training"], "adapter steps/s")
    assert set(trained) == {"K = 1", "K = 2"}
    assert columns(chapters["d-training"], "over K = 1")["K = 1"] == 1.0


@pytest.mark.slow
def test_conditions_are_read_alike_and_banks_cost_least(chapters):
    rows = chapters["f-conditions"]["rows"]
    for count in (1, 2):
        ways = {way: rows[f"{count} {way}"] for way in ("plain", "banks", "as published", "one pass", "extraction")}
        assert ways["banks"]["gap"] < 1e-5 > ways["as published"]["gap"]
        counted = [ways[way]["counted"] for way in ("plain", "banks", "as published", "one pass")]
        assert counted == sorted(counted) and counted[0] == 1.0 < counted[1]


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    """Table, JSON and exit code, from a process that has nothing but what that machine has."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.gpu", "--tiny", "--parts", "d", "--seconds-d", "300", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=surroundings(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "gpu.json").read_text())
    assert list(results["parts"]) == ["d"] and results["parts"]["d"]["training"]["finished"]
    assert results["machine"]["torch"] in done.stdout and "K = 1" in done.stdout
    assert done.stdout.strip() == (out / "gpu.txt").read_text().strip()


@pytest.mark.parametrize(("words", "message"), [
    (["--parts", "a,x"], "there is no part 'x'"), (["--device", "cpu"], "add --tiny")])
def test_a_wrong_call_is_refused_at_the_door(words, message, tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.gpu", "--out", str(tmp_path), *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


# what fails, fails alone ----------------------------------------------------------------------------------------------


def test_a_failed_measurement_is_recorded_and_the_next_one_made(tmp_path):
    report = Report(tmp_path / "x.json", time.time() + 60)

    def fail():
        raise RuntimeError("no kernel\nfor this")

    assert report.attempt("first", fail) is None
    assert report.attempt("second", lambda: 5) == 5
    report.cell("row", {"s": math.inf})
    content = read(tmp_path / "x.json")
    assert content["errors"][0]["what"] == "first" and content["errors"][0]["error"] == "RuntimeError: no kernel for this"
    assert content["rows"] == {"row": {"s": "inf"}}
    assert "FAILED first: RuntimeError: no kernel for this" in "\n".join(table.chapter("x", content, ""))


def test_nothing_begins_after_the_time_is_up(tmp_path):
    report = Report(tmp_path / "x.json", time.time() - 1)
    assert report.attempt("late", lambda: pytest.fail("was begun")) is None
    assert read(tmp_path / "x.json")["skipped"] == ["late"]


def test_a_lost_device_ends_the_chapter(tmp_path, monkeypatch):
    """After an error that the device does not get over, the failures of all that follows would be taken for theirs."""
    import torch

    def lost():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    report = Report(tmp_path / "x.json", time.time() + 60, "cuda")
    with pytest.raises(Broken, match="lost after indexing"):
        report.attempt("outer", report.attempt, "indexing", lambda: 1 / 0)
    assert [error["what"] for error in read(tmp_path / "x.json")["errors"]] == ["indexing"]


WRITES = "import json, os, sys, time; open(sys.argv[1], 'w').write(json.dumps({'rows': {'first': {}}})); "


@pytest.mark.parametrize(("then", "end"), [
    ("pass", ""), ("sys.exit(1)", "failed"), ("os.abort()", "ended by SIGABRT"), ("time.sleep(60)", "stopped at its limit of 2 s")])
def test_a_chapter_ends_without_the_command(then, end, tmp_path):
    """Whatever becomes of its process: what it had written is kept, and it takes no longer than its limit."""
    file, begun = tmp_path / "x.json", time.monotonic()
    content, how = run([sys.executable, "-c", WRITES + then, str(file)], file, 2.0)
    assert how == end and content == {"rows": {"first": {}}}
    assert time.monotonic() - begun < 20


def test_a_stopped_chapter_takes_its_workers_along(tmp_path):
    file, pid = tmp_path / "x.json", tmp_path / "pid"
    code = f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    run([sys.executable, "-c", code], file, 2.0)
    state = Path(f"/proc/{pid.read_text()}/status")
    for _ in range(50):
        if not state.is_file() or "State:\tZ" in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail("a worker outlived its chapter")


# the plan -------------------------------------------------------------------------------------------------------------


def test_the_important_parts_take_at_most_four_minutes():
    seconds = limits(["a", "c", "d"], None, {})
    assert sum(seconds.values()) + len(seconds) * GRACE <= 240 and list(PARTS) == ["a", "b", "c", "d", "e", "f"]


def test_seconds_are_shared_by_weight():
    shared = limits(["a", "b", "c"], 300.0, {"b": 100.0})
    assert shared["b"] == 100.0 and shared["a"] + shared["c"] == pytest.approx(200.0)
    assert shared["a"] / shared["c"] == pytest.approx(PARTS["a"].seconds / PARTS["c"].seconds)


def test_numbers_have_three_figures():
    figures = {0.01234: "0.012", 0.5: "0.50", 12.34: "12.3", 1234.5: "1234", 7: "7", None: "-", "equal": "equal"}
    assert {value: table.number(value) for value in figures} == figures
