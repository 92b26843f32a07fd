"""The record in a PNG: whole, the same every time, written in one stroke, never over another file."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from composition import Lora, Refused, atomic, record
from composition.log import Log
from tests.app import reader


def test_what_is_written_is_read_back(result, tmp_path):
    request = replace(result.request, loras=(replace(result.request.loras[0], source="ink"), result.request.loras[1]), count=1)
    for index in range(2):
        path = record.save(result, tmp_path, index=index)
        found = record.details(path)
        assert record.read(path) == found.request
        assert path.name == f"000{index}.png"
        assert found.request == replace(request, seed=41 + index)
        assert found.ours
        assert found.notes == result.notes
        assert found.receipts["owl"]["sha256"] == "b" * 64
        assert {"medley", "torch", "diffusers", "transformers"} <= set(found.versions)
        with Image.open(path) as image:
            assert image.tobytes() == result.images[index].tobytes()


def test_the_same_request_gives_the_same_bytes(result, tmp_path):
    first = record.save(result, tmp_path / "one").read_bytes()
    time.sleep(1.1)  # a clock in it would show
    again = replace(result, seconds={"denoise": 99.0})
    second = record.save(again, tmp_path / "somewhere else").read_bytes()
    assert first == second


def test_no_path_and_no_clock_in_it(result, tmp_path):
    bytes_ = record.save(result, tmp_path).read_bytes()
    for word in ("/somewhere", str(tmp_path), "seconds", "ss_output_name", "tIME"):
        assert word.encode() not in bytes_


def test_other_tools_read_its_parameters(result, tmp_path):
    with Image.open(record.save(result, tmp_path)) as image:
        read = reader.parameters(image.text["parameters"])
    assert read["Seed"] == "41"
    assert reader.hashes(read["Lora hashes"])["ink"] == "a" * 12


def test_names_go_on_after_the_highest(result, tmp_path):
    for name in ("0007.png", "0009-note.png", "x.png", "12.png"):
        (tmp_path / name).write_bytes(b"mine")
    path = record.save(result, tmp_path)
    assert path.name == "0010.png"
    path.unlink()
    assert record.save(result, tmp_path).name == "0011.png"  # the manifest still names 0010
    assert (tmp_path / "0007.png").read_bytes() == b"mine"


def test_a_torn_line_of_the_manifest_costs_itself_alone(result, tmp_path):
    (tmp_path / record.save(result, tmp_path).name).unlink()
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "00')
    assert record.save(result, tmp_path).name == "0001.png"  # the manifest still names 0000
    rows = [line for line in (tmp_path / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [json.loads(rows[0])["file_name"], rows[1], json.loads(rows[2])["file_name"]] == ["0000.png", '{"file_name": "00', "0001.png"]


def test_the_next_number_is_known_without_reading_the_manifest_whole(result, tmp_path, monkeypatch):
    """Where many pictures are, a new one costs no more than the manifest's end."""
    lines = [json.dumps({"file_name": f"{n:04d}.png", "text": "x" * 1000}) + "\n" for n in range(2000)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    consumed, newest = [], Log.newest
    monkeypatch.setattr(Log, "newest", lambda log: (consumed.append(row) or row for row in newest(log)))
    for whole in ("read_text", "read_bytes"):
        monkeypatch.setattr(Path, whole, None)
    assert record.free(tmp_path) == 2000
    assert len(consumed) == 1


def test_a_given_name_is_never_overwritten(result, tmp_path):
    record.save(result, tmp_path, "moon")
    before = (tmp_path / "moon.png").read_bytes()
    with pytest.raises(Refused, match="there already"):
        record.save(result, tmp_path, "moon", index=1)
    assert (tmp_path / "moon.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metadata.jsonl", "moon.png"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no hard links"])
def test_many_writers_lose_nothing(result, tmp_path, monkeypatch, links):
    if not links:
        lock = threading.Lock()
        original = atomic._link
        monkeypatch.setattr(atomic.os, "link", _no_links)

        def one_at_a_time(part: Path, target: Path) -> Path:
            with lock:
                return original(part, target)

        monkeypatch.setattr(atomic, "_link", one_at_a_time)
    threads = [threading.Thread(target=record.save, args=(result, tmp_path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"000{index}.png" for index in range(8)]
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert sorted(row["file_name"] for row in rows) == [f"000{index}.png" for index in range(8)]
    assert not list(tmp_path.glob(".*"))


def _no_links(*_: object) -> None:
    raise PermissionError("no hard links here")


@pytest.mark.parametrize("where", ["save", "fsync", "link"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_crash_while_writing_leaves_nothing(result, tmp_path, monkeypatch, where, error):
    def crash(*_: object, **__: object) -> None:
        raise error

    def half(image: Image.Image, file, **_: object) -> None:
        file.write(b"\x89PNG half")
        raise error

    if where == "save":
        monkeypatch.setattr(Image.Image, "save", half)
    else:
        monkeypatch.setattr(atomic.os, where, crash)
        monkeypatch.setattr(atomic.os, "replace", crash)
    with pytest.raises(type(error)):
        record.save(result, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_one_row_per_picture(result, tmp_path):
    record.save(result, tmp_path)
    record.save(result, tmp_path, index=1)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [row["seed"] for row in rows] == [41, 42]
    assert rows[0]["loras"] == ["ink", "owl"]
    assert json.loads(rows[0]["request"])["options"] == {"tau": 3}
    assert rows[0].keys() == rows[1].keys()
    assert (rows[0]["width"], rows[0]["height"]) == (48, 32)


# reading what is not ours, or broken


def _png(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_picture_of_another_tool(tmp_path):
    path = _png(tmp_path / "x.png", parameters="a fox <lora:owl:0.5>\nSteps: 9, Seed: 3, CFG scale: 2, Model: dream")
    found = record.details(path)
    assert not found.ours
    assert found.model == "dream"
    assert found.request.loras == (Lora("owl", weight=0.5),)


@pytest.mark.parametrize(("texts", "said"), [
    ({}, "no request in it"),
    ({"prompt": "{}", "workflow": "{}"}, "ComfyUI"),
    ({"parameters": '{"sui_image_params": {}}'}, "SwarmUI"),
    ({"invokeai_metadata": "{}"}, "InvokeAI"),
    ({"medley": "{"}, "damaged"),
    ({"medley": "[]"}, "damaged"),
    ({"medley": '{"request": 3}'}, "damaged"),
    ({"medley": '{"request": {}, "receipts": {"a": 1}}'}, "damaged"),
    ({"medley": "[" * 100_000}, "damaged"),
    ({"medley": '{"request": {"steps": 3}}'}, "prompt"),
    ({"medley": '{"request": {"prompt": "a", "schema_version": 999}}'}, "newer"),
    ({"medley": '{"request": {"prompt": "a", "steps": 0}}'}, "steps"),
])
def test_a_picture_without_a_request_is_refused(texts, said, tmp_path):
    with pytest.raises(Refused, match=said):
        record.read(_png(tmp_path / "x.png", **texts))


def test_what_is_no_picture_is_refused(tmp_path, result):
    with pytest.raises(Refused, match="not there"):
        record.read(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(Refused, match="cannot be read as a picture"):
        record.read(tmp_path / "text.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    with pytest.raises(Refused, match="no request in it"):
        record.read(tmp_path / "x.jpg")
    with pytest.raises(Refused):
        record.read(tmp_path)
    whole = record.save(result, tmp_path).read_bytes()
    for part in (len(whole) // 2, 60, 20):
        (tmp_path / "cut.png").write_bytes(whole[:part])
        with pytest.raises(Refused):
            record.read(tmp_path / "cut.png")
