"""Batches: in order, resumed after any stop, one row's trouble its own, and ids that change with all a picture depends on."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from composition import Cancelled, Engine, Lora, Refused, Request, backbones, batch, manifest, record
from composition.batch import Identity, run_many
from composition.record import png
from tests import toys


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(model folder, LoRA folder) of a toy."""
    root, pipe = tmp_path_factory.mktemp("batch"), toys.sd(blocks=(16, 32))
    pipe.save_pretrained(root / "model")
    (root / "loras").mkdir()
    for seed, name in enumerate(("fox", "owl")):
        toys.lora(pipe, root / f"loras/{name}.safetensors", seed=seed, targets=("attn",), text=False)
    return root / "model", root / "loras"


@pytest.fixture(scope="module")
def engine(parts):
    with Engine.open(str(parts[0]), device="cpu", folders=[parts[1]]) as engine:
        yield engine


@pytest.fixture
def runs(engine, monkeypatch):
    """The requests that the engine was asked to run."""
    asked, run = [], engine.run
    monkeypatch.setattr(engine, "run", lambda request, *a, **k: (asked.append(request), run(request, *a, **k))[1])
    return asked


def some(*prompts, **fields):
    return [Request(prompt, loras=[Lora("fox")], steps=2, sampler="euler", seed=index, **fields) for index, prompt in enumerate(prompts)]


def log(folder):
    return [json.loads(line) for line in (folder / "made.jsonl").read_text().splitlines()]


def test_results_come_in_the_order_of_the_requests_with_their_records(engine, tmp_path):
    requests = some("c", "a", "b")
    items = list(run_many(engine, requests, tmp_path))
    assert [item.request.prompt for item in items] == ["c", "a", "b"] and [item.index for item in items] == [0, 1, 2]
    for item, request in zip(items, requests, strict=True):
        assert item.path == tmp_path / f"pictures/{item.id}.png" and item.fresh and not item.error
        assert item.request == engine.settle(request)[0]
        assert record.read(item.path) == replace(item.request, model=record.read(item.path).model)  # which is named, without its path
        assert item.seconds > 0 and item.evaluations == 2
    with pytest.raises(FrozenInstanceError):
        items[0].error = "x"


def test_there_can_be_fewer_items_taken_than_there_are(engine, tmp_path, runs):
    """The iterator makes nothing that was not asked for, and gives the engine back."""
    items = run_many(engine, some("a", "b", "c"), tmp_path)
    next(items)
    items.close()
    assert len(runs) == 1
    assert [item.fresh for item in run_many(engine, some("a", "b", "c"), tmp_path)] == [False, True, True]


def test_the_same_call_again_makes_nothing_and_says_the_same(engine, tmp_path, runs):
    first = list(run_many(engine, some("a", "b"), tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")}
    again = list(run_many(engine, some("a", "b"), tmp_path))
    assert len(runs) == 2
    assert again == [replace(item, fresh=False) for item in first]
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_two_equal_rows_are_one_picture(engine, tmp_path, runs):
    request = some("a")[0]
    first, second = run_many(engine, [request, replace(request)], tmp_path)
    assert len(runs) == 1 and first.path == second.path and (first.fresh, second.fresh) == (True, False)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_a_request_that_leaves_steps_open_is_one_with_the_models_own(engine, tmp_path):
    steps, guidance = engine.backbone.defaults
    open_, explicit = run_many(engine, [Request("a"), Request("a", steps=steps, guidance=guidance)], tmp_path)
    assert open_.id == explicit.id and (open_.request.steps, open_.request.guidance) == (steps, guidance)


def test_several_pictures_of_a_request_are_items_of_their_own(engine, tmp_path):
    items = list(run_many(engine, [replace(some("a")[0], count=3), replace(some("a")[0], seed=1)], tmp_path))
    assert [(item.index, item.request.seed, item.request.count) for item in items] == [(0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 1, 1)]
    assert items[3].path == items[1].path


def test_one_that_fails_is_recorded_and_tried_again(engine, parts, tmp_path, runs):
    requests = some("a", "b", "c")
    requests[1] = replace(requests[1], loras=[Lora("wolf")])
    items = list(run_many(engine, requests, tmp_path))
    assert [bool(item.path) for item in items] == [True, False, True] and "no LoRA is named 'wolf'" in items[1].error
    (line,) = [line for line in log(tmp_path) if "error" in line]
    assert line["error"] == items[1].error and line["request"]["prompt"] == "b"
    shutil.copy(parts[1] / "owl.safetensors", parts[1] / "wolf.safetensors")
    try:
        again = list(run_many(engine, requests, tmp_path))
    finally:
        (parts[1] / "wolf.safetensors").unlink()
    assert [item.fresh for item in again] == [False, True, False] and not any(item.error for item in again)


def test_whatever_is_raised_on_the_way_is_that_rows(engine, tmp_path, monkeypatch):
    run = engine.run

    def failing(request, *rest, **more):
        if request.prompt == "b":
            raise RuntimeError("device lost")
        return run(request, *rest, **more)

    monkeypatch.setattr(engine, "run", failing)
    items = list(run_many(engine, some("a", "b", "c"), tmp_path, sentence=lambda error: f"sorry, {error}"))
    assert [item.error for item in items] == ["", "sorry, device lost", ""]
    assert [item.error for item in run_many(engine, some("b"), tmp_path)] == ["RuntimeError: device lost"]


@pytest.mark.parametrize("stop", ["after the line", "after the picture"])
def test_a_kill_between_the_line_the_picture_and_the_manifest(engine, tmp_path, monkeypatch, runs, stop):
    """What a kill leaves is put right by the same call, with no more than that picture made again."""

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    list(run_many(engine, some("a"), tmp_path))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if stop == "after the line":
            patch.setattr(batch.record, "save", kill)
        else:
            patch.setattr(png, "_row", kill)
        list(run_many(engine, some("a", "b"), tmp_path))
    assert [line["seed"] for line in log(tmp_path)] == [0, 1]  # the line is there, whatever came of the picture
    (tmp_path / "pictures/.0123456789abcdef.png.tmp").write_bytes(b"\x89PNG")
    with (tmp_path / "made.jsonl").open("a") as file:
        file.write('{"id": "half a li')
    runs.clear()
    items = list(run_many(engine, some("a", "b", "c"), tmp_path))
    assert [request.prompt for request in runs] == (["b", "c"] if stop == "after the line" else ["c"])
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == sorted([*{f"{item.id}.png" for item in items}, "metadata.jsonl"])
    rows = [json.loads(line) for line in (tmp_path / "pictures/metadata.jsonl").read_text().splitlines()]
    assert sorted(row["file_name"] for row in rows) == names[:-1]
    assert {row["model"] for row in rows} == {engine.name}  # as it was asked for, so that the manifest makes them again
    assert all(item.seconds for item in items)


def test_a_picture_without_its_line_is_made_again(engine, tmp_path, runs):
    (item,) = run_many(engine, some("a"), tmp_path)
    Image.new("RGB", (8, 8)).save(item.path)
    (tmp_path / "made.jsonl").unlink()
    (again,) = run_many(engine, some("a"), tmp_path)
    assert again.fresh and record.read(again.path).prompt == "a"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_killed_at_any_moment_it_comes_to_the_same_pictures(engine, parts, tmp_path):
    requests = some(*"abcdefghijkl")
    whole = [hashlib.sha256(item.path.read_bytes()).hexdigest() for item in run_many(engine, requests, tmp_path / "whole")]
    code = ("import sys; from pathlib import Path; from composition import Engine, Lora, Request; from composition.batch import run_many\n"
            "engine = Engine.open(sys.argv[1], device='cpu', folders=[Path(sys.argv[2])])\n"
            "requests = [Request(p, loras=[Lora('fox')], steps=2, sampler='euler', seed=k) for k, p in enumerate('abcdefghijkl')]\n"
            "list(run_many(engine, requests, Path(sys.argv[3])))\n")
    pictures = tmp_path / "cut/pictures"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, parts), str(tmp_path / "cut")], env=os.environ | {"OMP_NUM_THREADS": "1"},
                               cwd=Path(__file__).parents[2])
    until = time.monotonic() + 300
    while len(list(pictures.glob("*.png")) if pictures.is_dir() else ()) < 3:
        assert process.poll() is None and time.monotonic() < until, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in pictures.glob("*.png")}
    items = list(run_many(engine, requests, tmp_path / "cut"))
    assert {name: (pictures / name).stat().st_mtime_ns for name in there} == there  # none of them was made again
    assert sum(item.fresh for item in items) == len(requests) - len(there)
    assert [hashlib.sha256(item.path.read_bytes()).hexdigest() for item in items] == whole


def test_cancelled_it_stops_before_the_next_evaluation_and_goes_on_later(engine, tmp_path, runs):
    cancel, seen = threading.Event(), []

    def watch(progress):
        seen.append(progress)
        if progress.steps == 3:  # in the second picture
            cancel.set()

    items = run_many(engine, some("a", "b", "c"), tmp_path, on_progress=watch, cancel=cancel)
    assert next(items).fresh
    with pytest.raises(Cancelled):
        next(items)
    assert [item.fresh for item in run_many(engine, some("a", "b", "c"), tmp_path)] == [False, True, True]
    with pytest.raises(Cancelled):
        next(run_many(engine, some("a", "b", "c"), tmp_path, cancel=cancel))


def test_progress_is_of_what_was_missing(engine, tmp_path):
    list(run_many(engine, some("a"), tmp_path))
    seen = []
    requests = [*some("a", "b", "c"), replace(some("d")[0], loras=[Lora("wolf")])]
    list(run_many(engine, requests, tmp_path, on_progress=seen.append))
    assert (seen[0].done, seen[0].pictures, seen[0].steps, seen[0].of_steps) == (0, 2, 0, 4)
    assert [progress.steps for progress in seen] == sorted(progress.steps for progress in seen)
    assert (seen[-1].done, seen[-1].pictures, seen[-1].steps, seen[-1].of_steps) == (2, 2, 4, 4)


def test_two_batches_do_not_work_in_one_folder(engine, tmp_path):
    first = run_many(engine, some("a", "b"), tmp_path)
    next(first)
    with pytest.raises(Refused, match="another batch"):
        next(run_many(engine, some("a"), tmp_path))
    first.close()
    assert not next(run_many(engine, some("a"), tmp_path)).fresh


def test_a_folder_that_cannot_be_is_refused_at_once(engine, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match="is a file"):
        run_many(engine, some("a"), tmp_path / "file")


# ids


def test_the_id_is_of_the_lora_files_bytes(engine, parts, tmp_path):
    file, tensors = parts[1] / "hen.safetensors", load_file(parts[1] / "owl.safetensors")
    save_file(tensors, file)
    try:
        request, ids = engine.settle(Request("a", loras=[Lora("hen")], steps=2))[0], []
        for factor in (1, 2, 1):
            save_file({key: value * factor for key, value in tensors.items()}, file)
            os.utime(file, (1, 1))  # the same size and time each time
            ids.append(Identity(engine).of(request))
    finally:
        file.unlink()
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json"])
def test_the_id_is_of_the_models_files(engine, parts, tmp_path, monkeypatch, part):
    shutil.copytree(parts[0], tmp_path / "model")
    (tmp_path / "model/README.md").write_text("x")
    request = engine.settle(Request("a", steps=2))[0]
    monkeypatch.setattr(engine, "name", str(tmp_path / "model"))
    first = Identity(engine).of(request)
    (tmp_path / "model/README.md").write_text("y")
    assert Identity(engine).of(request) == first
    file = tmp_path / "model" / part
    file.write_bytes(file.read_bytes() + b" ")
    assert Identity(engine).of(request) != first


def test_the_id_is_of_a_masks_bytes_and_of_further_files(engine, tmp_path):
    mask, other = tmp_path / "mask.png", tmp_path / "denoiser.gguf"
    other.write_bytes(b"1")
    ids, request = set(), Request("a")
    for shade in (0, 255):
        Image.new("L", (8, 8), 255).save(mask)
        with Image.open(mask) as image:
            image.putpixel((0, 0), shade)
            image.save(mask)
        request = engine.settle(Request("a", loras=[Lora("fox", region=str(mask))], steps=2))[0]
        ids.add(Identity(engine).of(request))
    ids.add(Identity(engine, [other]).of(request))
    other.write_bytes(b"2")
    ids.add(Identity(engine, [other]).of(request))
    assert len(ids) == 4


@pytest.mark.parametrize("change", [{"prompt": "b"}, {"seed": 1}, {"steps": 3}, {"method": "switch"}, {"loras": [Lora("fox", weight=0.5)]}])
def test_the_id_is_of_the_whole_request(engine, change):
    request = engine.settle(some("a")[0])[0]
    assert Identity(engine).of(replace(request, **change)) != Identity(engine).of(request)


def test_the_id_is_of_the_number_type_and_the_libraries(monkeypatch):
    engine, half = (Engine(backbones.of(toys.sd(dtype=dtype), "sd"), "toy") for dtype in (torch.float32, torch.bfloat16))
    request = engine.settle(Request("a"))[0]
    first = Identity(engine).of(request)
    assert first != Identity(half).of(request)
    monkeypatch.setattr(batch.record, "versions", lambda: {"diffusers": "99"})
    assert Identity(engine).of(request) != first


@pytest.mark.parametrize("name", ["pocket", "pocket-flux"])
def test_a_bundled_model_is_known_by_its_files(name, tmp_path, monkeypatch):
    """A retrained one of the same name is another."""
    from composition import bundled

    own = bundled.path(bundled.BUNDLES[name].model)
    stamps = batch.model_stamps(name)
    assert {row[0] for row in stamps} >= {"model_index.json", "vae/config.json"}
    copy = tmp_path / bundled.BUNDLES[name].model
    shutil.copytree(own, copy)
    monkeypatch.setattr(bundled, "path", lambda relative: tmp_path / relative)
    assert batch.model_stamps(name) == stamps
    weights = next(copy.rglob("diffusion_pytorch_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert batch.model_stamps(name) != stamps


# manifests


def test_a_manifest_is_requests_or_what_an_evaluation_asks(engine, tmp_path):
    (item,) = run_many(engine, some("a"), tmp_path)
    picture = item.path
    lines = [{"prompt": "a fox", "seed": 4, "loras": [{"source": "owl", "weight": 0.5}]},
             {"text": "an owl", "concepts": ["an owl"], "group": "x", "method": "switch"},
             json.loads((picture.parent / "metadata.jsonl").read_text()), {"prompt": "x", "model": "other"}]
    (tmp_path / "m.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    found = manifest.read(tmp_path / "m.jsonl", "toy")
    assert [line.number for line in found] == [1, 3, 5, 7] and not any(line.error for line in found)
    assert found[0].request == Request("a fox", seed=4, loras=[Lora("owl", weight=0.5)], model="toy")
    assert found[1].request == Request("an owl", method="switch", model="toy")
    assert found[2].request == item.request and found[3].request.model == "other"


@pytest.mark.parametrize(("line", "says"), [
    (b"{", "JSON"), (b"[1]", "object"), (b'"x"', "object"), (b'{"seed": 1}', "neither"), (b'{"prompt": "x", "steps": 0}', "steps"),
    (b'{"prompt": "x", "colour": 1}', "colour"), (b'{"file_name": "a.png", "text": "x"}', "no request"), (b'{"prompt": "\xff"}', "UTF-8"),
    (b'{"request": "{}"}', "prompt"), (b"[" * 100_000, "nested over"), (b'{"prompt": "\\ud800"}', "half a letter"),
])
def test_a_bad_line_is_told_by_its_number(tmp_path, line, says):
    (tmp_path / "m.jsonl").write_bytes(b'{"prompt": "a"}\n\r\n' + line + b'\n{"prompt": "b"}')
    first, bad, last = manifest.read(tmp_path / "m.jsonl")
    assert (first.request.prompt, last.request.prompt) == ("a", "b")
    assert bad.number == 3 and bad.request is None and says in bad.error


def test_a_manifest_that_is_not_there_or_empty_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "empty.jsonl"):
        with pytest.raises(Refused, match="one request a line"):
            manifest.read(path)
