"""Logs, manifests and numbers of pictures after faults, and their cost in a folder of ten thousand."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from composition import Engine, Lora, Request, Result, atomic, backbones, record
from composition.batch import run_many
from composition.log import Log
from composition.record import png
from composition.training import captions
from tests import toys


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    pipe = toys.sd()
    for name in ("line\u2028separator", "plain"):
        toys.lora(pipe, folder / f"{name}.safetensors", seed=1, targets=("attn",), text=False)
    return Engine(backbones.of(pipe, "sd"), "toy", folders=[folder])


def a_result(prompt="a fox"):
    return Result((Image.new("RGB", (8, 8)),), Request(prompt, model="toy", steps=1, guidance=1.0), {}, {}, ())


def test_names_with_line_separators_are_not_made_again(engine, tmp_path):
    """U+2028, U+2029, U+0085 and form feeds end a line for some readers of text, and for none of ours."""
    requests = [Request(f"a{letter}b", loras=[Lora("line\u2028separator")], steps=1) for letter in "\u2028\u2029\x85\x0c\x1c"]
    first = list(run_many(engine, requests, tmp_path))
    assert all(item.fresh and not item.error for item in first)
    assert [item.fresh for item in run_many(engine, requests, tmp_path)] == [False] * len(requests)
    listed = Log(tmp_path / "pictures/metadata.jsonl")
    assert [row["text"] for row in listed.rows()] == [request.prompt for request in requests] and listed.damaged == 0


def test_captions_in_a_table_may_have_line_separators(tmp_path):
    lines = [{"file_name": f"{n}.png", "text": f"a fox{letter}in the snow"} for n, letter in enumerate("\u2028\x85\x0b")]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n", "utf-8")
    assert captions.beside(tmp_path, [tmp_path / f"{n}.png" for n in range(3)]) == {f"{n}.png": "a fox in the snow" for n in range(3)}


def test_nobody_but_the_log_appends_to_a_file():
    root = Path(__file__).parents[2]
    append = re.compile(r"""open\([^)\n]*["'][abt+]*a[abt+]*["']|O_APPEND""")
    assert append.search('path.open("ab")') and append.search("open(path, 'a')") and not append.search('path.open("rb")')
    files = [path for room in ("app", "composition", "retrieval") for path in (root / room).rglob("*.py")]
    assert {path.relative_to(root).as_posix() for path in files if append.search(path.read_text("utf-8"))} == {"composition/log.py"}


def test_half_a_character_of_a_file_name_is_written_and_read_back(tmp_path):
    log = Log(tmp_path / "a.jsonl")
    log.append({"file": "caf\udce9.png"})
    assert log.rows() == [{"file": "caf\udce9.png"}] == list(log.newest())
    atomic.write(tmp_path / "b.json", json.dumps({"file": "caf\udce9.png"}, ensure_ascii=False))
    assert json.loads((tmp_path / "b.json").read_text("utf-8")) == {"file": "caf\udce9.png"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_real_limit_tears_one_line_and_says_so(tmp_path):
    code = ("import resource, sys; from pathlib import Path; from composition.log import Log\n"
            "log = Log(Path(sys.argv[1])); log.append({'n': 0, 'x': 'y' * 400})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
            "try: log.append({'n': 1, 'x': 'y' * 400})\n"
            "except OSError as error: print('told', error.filename)")
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl")], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["told", str(tmp_path / "a.jsonl")]
    log = Log(tmp_path / "a.jsonl")
    assert [row["n"] for row in log.rows()] == [0] and log.damaged == 1
    log.append({"n": 2})
    assert [row["n"] for row in log.rows()] == [0, 2]


def test_a_disk_that_fills_up_in_a_batch_is_not_exit_0_and_the_same_command_goes_on(medley, toy, tmp_path, monkeypatch):
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"prompt": f"fox {n}", "steps": 1}) for n in range(3)))
    call = ("batch", "m.jsonl", "--model", toy.model, "--out", "b")
    honest, calls = os.write, []

    def write(handle, data):
        calls.append(1)
        return honest(handle, data[: len(data) // 2] if len(calls) > 4 else data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        said = medley(*call)
    assert said.code in (2, 3) and "a part of a line" in said.err
    said = medley(*call)
    assert said.code == 0, said.err
    pictures = {path.name for path in (tmp_path / "b/pictures").glob("*.png")}
    assert len(pictures) == 3 == len({row["file_name"] for row in Log(tmp_path / "b/pictures/metadata.jsonl").rows()})


def test_a_manifest_that_cannot_be_written_is_told_with_its_picture(medley, toy, tmp_path, monkeypatch):
    call = ("generate", "a fox", "--model", toy.model, "--steps", 1, "--out", "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data, honest=os.write: honest(handle, data[:9]))
        said = medley(*call)
    assert said.code == 2 and "metadata.jsonl" in said.err
    assert (tmp_path / "out/0000.png").is_file()
    assert medley(*call).code == 0 and (tmp_path / "out/0001.png").is_file()
    listed = Log(tmp_path / "out/metadata.jsonl")
    assert "0001.png" in [row["file_name"] for row in listed.rows()]


def test_unfinished_files_of_a_shared_folder_go_when_nobody_can_be_writing_them(tmp_path):
    for name, age in (("0123456789abcdef", 0), ("fedcba9876543210", 2 * atomic.LONG)):
        (tmp_path / f".{name}.png.tmp").write_bytes(b"x")
        os.utime(tmp_path / f".{name}.png.tmp", (time.time() - age,) * 2)
    atomic.sweep(tmp_path, shared=True)
    assert [path.name for path in tmp_path.iterdir()] == [".0123456789abcdef.png.tmp"]
    atomic.sweep(tmp_path)
    atomic.sweep(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_a_kill_left_unlisted_is_listed_by_the_next_command(medley, toy, tmp_path, monkeypatch):
    """With its request whole; pictures of others, and those of the last seconds, are left alone."""
    call = ("generate", "a fox", "--model", toy.model, "--steps", 1, "--out", "out")

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(png, "_row", kill)
            medley(*call)
    Image.new("RGB", (8, 8)).save(tmp_path / "out/0002.png")
    os.utime(tmp_path / "out/0000.png", (1, 1))
    os.utime(tmp_path / "out/0002.png", (1, 1))
    assert medley(*call).code == 0
    rows = Log(tmp_path / "out/metadata.jsonl").rows()
    assert [row["file_name"] for row in rows] == ["0000.png", "0003.png"]
    assert Request.read(rows[0]["request"]) == record.read(tmp_path / "out/0000.png")
    assert record.mend(tmp_path / "out") == record.mend(tmp_path / "nowhere") == []


# numbers -------------------------------------------------------------------------------------------------------------


def test_numbers_follow_the_highest_whatever_else_comes_to_the_folder(tmp_path):
    names = [record.save(a_result(), tmp_path).name for _ in range(3)]
    assert names == ["0000.png", "0001.png", "0002.png"]
    time.sleep(0.05)  # the clock of a file system has ticks
    (tmp_path / "0010.png").write_bytes(b"a stranger's")
    assert record.save(a_result(), tmp_path).name == "0011.png"
    (tmp_path / "0011.png").unlink()  # its line stays, and its number
    assert record.save(a_result(), tmp_path).name == "0012.png"
    assert png.free(tmp_path, "fox-") == 0 and png.free(tmp_path / "nowhere") == 0
    assert record.save(a_result(), tmp_path, f"fox-{png.free(tmp_path, 'fox-'):04d}-merge").name == "fox-0000-merge.png"
    assert png.free(tmp_path, "fox-") == 1 and record.save(a_result(), tmp_path).name == "0013.png"


def test_a_picture_that_a_kill_left_unlisted_keeps_its_number(tmp_path):
    record.save(a_result(), tmp_path)
    record.publish(Image.new("RGB", (8, 8)), tmp_path)  # and no line
    assert record.save(a_result(), tmp_path).name == "0002.png"


def test_ten_thousand_pictures_cost_no_more_than_ten(tmp_path, monkeypatch):
    """The folder is not looked through for each picture, nor is the manifest read whole."""
    for number in range(10_000):
        (tmp_path / f"{number:04d}.png").touch()
    with (tmp_path / "metadata.jsonl").open("w") as file:
        file.writelines(json.dumps({"file_name": f"{number:04d}.png", "text": "a fox" * 20}) + "\n" for number in range(10_000))
    looked, listdir = [], os.listdir
    monkeypatch.setattr(png.os, "listdir", lambda folder: (looked.append(folder), listdir(folder))[1])
    names = [record.save(replace(a_result()), tmp_path).name for _ in range(20)]
    assert names == [f"{number}.png" for number in range(10_000, 10_020)]
    assert looked.count(tmp_path) <= 1
