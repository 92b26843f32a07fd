"""The record in a PNG: whole, the same every time, written in one stroke, never over another file."""

import hashlib
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from composition import Lora, Refused, Request, atomic, pictures, record
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


# names, not paths


def _with_paths(result, tmp_path):
    Image.new("L", (40, 20), 255).save(tmp_path / "secret-mask.png")
    loras = (Lora(str(tmp_path / "styles/ink.safetensors"), weight=0.8, region=str(tmp_path / "secret-mask.png")), Lora(r"C:\\mine\\owl.safetensors"))
    return replace(result, request=replace(result.request, loras=loras, model=str(tmp_path / "models/sd15")))


def test_a_record_has_names_and_hashes_and_the_mask_itself(result, tmp_path):
    path = record.save(_with_paths(result, tmp_path), tmp_path / "out")
    for secret in (str(tmp_path), "secret-mask", "mine", "styles", "models/"):
        assert secret.encode() not in path.read_bytes()
    request = record.read(path)
    assert [lora.source for lora in request.loras] == ["ink", "owl"] and request.model == "sd15/"
    assert record.is_path(request.model) and not record.is_path("sd15")  # a folder's name is no short name
    assert record.details(path).receipts["ink"]["data_sha256"] == "a" * 64
    assert np.asarray(pictures.mask(request.loras[0].region, "ink")).mean() == 255


def test_paths_are_kept_where_they_are_asked_for(result, tmp_path):
    given = _with_paths(result, tmp_path)
    assert record.read(record.save(given, tmp_path / "out", keep_paths=True)) == given.request.alone(0)
    row = json.loads((tmp_path / "out/metadata.jsonl").read_text("utf-8"))
    assert row["model"] == str(tmp_path / "models/sd15")  # a user's own list


@pytest.mark.parametrize("model", ["pocket", "flux-dev", "org/some.model-1", "folder"])
def test_a_name_stays_a_name(result, tmp_path, model):
    saved = record.save(replace(result, request=replace(result.request, model=model)), tmp_path)
    assert record.read(saved).model == model and not record.is_path(model)


def test_a_strangers_record_chooses_no_file(result, tmp_path):
    strange = record.read(record.save(_with_paths(result, tmp_path), tmp_path / "out", keep_paths=True))
    with pytest.raises(Refused, match="allow-paths"):
        record.by_name(strange)
    named = record.by_name(replace(strange, loras=strange.loras[1:]))
    assert named.loras[0].source == "owl" and named.model == "sd15/"


def test_of_several_files_of_a_name_the_one_with_the_hash_is_meant(result, tmp_path):
    from safetensors.torch import save_file

    paths = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        paths.append(tmp_path / str(number) / "owl.safetensors")
        save_file({"x.lora_A.weight": torch.full((2, 2), number + 1.0)}, paths[-1], metadata={"n": str(number)})
    whole = hashlib.sha256(paths[1].read_bytes()).hexdigest()
    data = paths[1].read_bytes()
    after = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()
    request = Request(prompt="a", loras=[Lora("owl")])
    for known in ({"receipts": {"owl": {"sha256": whole}}}, {"hashes": {"owl": after[:12]}}, {"hashes": {"owl": whole[:10]}}):
        assert record.located(request, record.Record(request, **known), paths, lambda source: Path(source)).loras[0].source == str(paths[1])

    def missing(source: str) -> Path:
        raise Refused(f"no {source}")

    with pytest.raises(Refused, match=f"no owl.*{whole[:12]}"):
        record.located(request, record.Record(request, receipts={"owl": {"sha256": whole}}), [], missing)


@pytest.mark.parametrize(("digits", "said"), [("a" * 12, 0), ("A" * 10, 0), ("c" * 12, 1), ("xyz", 0), ("cc", 0)])
def test_a_lora_of_the_name_with_another_hash_is_another_file(result, digits, said):
    receipts = dict(zip(result.request.names, result.receipts, strict=True))
    lines = record.differences(record.Record(result.request, ours=False, hashes={"ink": digits}), receipts, {})
    assert len(lines) == said and all("ink is not the file" in line and digits in line for line in lines)


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_the_text_of_other_formats_is_read(tmp_path, ending):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a fox <lora:owl:0.5>\nSteps: 9, Seed: 3, CFG scale: 2".encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / f"x.{ending}", exif=exif)
    assert record.read(tmp_path / f"x.{ending}") == Request(prompt="a fox", loras=[Lora("owl", weight=0.5)], steps=9, seed=3, guidance=2)


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
