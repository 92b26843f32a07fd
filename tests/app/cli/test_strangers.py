"""A stranger's picture or manifest chooses no file of this machine and no download, until that is allowed."""

import json
import os
import shutil
import socket

import pytest
from PIL import Image, PngImagePlugin

from app.evaluation import manifest
from composition import Condition, Lora, Request, record


def _record(path, **fields):
    """A picture with this request in it, as somebody may write it by hand."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("medley", json.dumps({"request": json.loads(Request(prompt="a fox", steps=1, seed=1).json()) | fields}))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Every attempt to reach another machine, none of which succeeds; and a hub cache that is empty."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return asked


@pytest.fixture
def common(toy):
    return ("--model", toy.model, "--lora-dir", toy.loras)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_region_of_a_record_is_not_read_unasked(medley, common, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # whoever opens it hangs
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    for region in ("pipe.png", str(tmp_path / "mask.png"), "mask.png"):
        path = _record(tmp_path / "x.png", method="regions", loras=[{"source": "owl", "region": region}])
        for command in (("generate",), ("compare", "--methods", "regions")):
            answer = medley(*command, "--from", path, *common)
            assert answer.code == 2 and "--allow-paths" in answer.err and region in answer.err
    assert not (tmp_path / "pictures").exists()
    answer = medley("generate", "--from", path, "--allow-paths", *common)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("model", ["sd15", "flux-dev", "somebody/tracker", "owner/name.v2"])
def test_a_model_of_a_record_is_not_fetched_unasked(medley, tmp_path, offline, monkeypatch, model):
    path = _record(tmp_path / "x.png", model=model)
    for command in ("generate", "compare"):
        answer = medley(command, "--from", path)
        assert answer.code == 2 and "--allow-download" in answer.err and model in answer.err
    assert offline == []
    opened = []
    monkeypatch.setattr("app.engines.open_engine", lambda name, place: opened.append((name, os.environ["HF_HUB_OFFLINE"])) or 1 / 0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    medley("generate", "--from", path, "--allow-download")
    assert opened == [(model, "0")]


def test_a_model_of_a_record_is_no_file_or_folder_here(medley, tmp_path, toy, offline):
    shutil.copytree(toy.model, tmp_path / "here")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").symlink_to(toy.model)
    for model in (str(toy.model), "here", "owner/model", "../here", "here/", "~/model", "x.safetensors", "C:\\models\\x"):
        answer = medley("generate", "--from", _record(tmp_path / "x.png", model=model))
        assert answer.code == 2 and "--model" in answer.err, model
    assert offline == []
    assert medley("generate", "--from", _record(tmp_path / "x.png", model="here"), "--allow-paths").code == 0


def test_loras_of_a_record_come_from_the_folders_alone(medley, common, toy, tmp_path):
    """By path, by a name that a file of the current folder has, with the ending twice, and by a tag in the prompt."""
    shutil.copy(toy.loras / "fox.safetensors", tmp_path / "secret.safetensors")
    shutil.copy(toy.loras / "ink.safetensors", tmp_path / "owl.safetensors")
    for source in (str(tmp_path / "secret.safetensors"), "secret", "./secret.safetensors", "secret.safetensors.safetensors", "../x/secret"):
        for fields in ({"loras": [{"source": source}]}, {"prompt": f"a fox <lora:{source}:1>"}):
            answer = medley("generate", "--from", _record(tmp_path / "x.png", **fields), *common)
            assert answer.code == 2 and not (tmp_path / "pictures").exists(), (source, answer)
    answer = medley("generate", "--from", _record(tmp_path / "x.png", loras=[{"source": str(tmp_path / "owl.safetensors")}]), *common)
    assert answer.code == 0, answer.err  # its name is looked up: the folder's owl, not the one that the path names
    used = record.details(tmp_path / "pictures/0000.png").receipts["owl"]
    assert used["sha256"] != record.details(_mine(medley, common, tmp_path)).receipts["owl"]["sha256"]


def _mine(medley, common, tmp_path):
    answer = medley("generate", "a fox", "--lora", tmp_path / "owl.safetensors", "--steps", 1, "--seed", 1, "--out", "mine", *common)
    assert answer.code == 0, answer.err
    return tmp_path / "mine/0000.png"


def test_allowed_a_path_of_a_record_is_taken(medley, common, toy, tmp_path):
    shutil.copy(toy.loras / "fox.safetensors", tmp_path / "secret.safetensors")
    path = _record(tmp_path / "x.png", loras=[{"source": str(tmp_path / "secret.safetensors")}])
    assert medley("generate", "--from", path, "--allow-paths", *common).code == 0


def test_conditions_of_a_record_name_no_file(medley, common, tmp_path):
    path = _record(tmp_path / "x.png", conditions=[{"source": "/a.safetensors", "image": "/etc/passwd"}])
    answer = medley("generate", "--from", path, *common)
    assert answer.code == 2 and "--allow-paths" in answer.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_reading_a_record_opens_nothing_that_it_names(tmp_path, offline):
    """`record.read` answers the request as it stands: its paths and model are words until an Engine gets them."""
    os.mkfifo(tmp_path / "pipe")
    named = str(tmp_path / "pipe")
    path = _record(tmp_path / "x.png", model="somebody/tracker", loras=[{"source": named, "region": named}],
                   conditions=[{"source": named, "image": named}])
    request = record.read(path)
    assert request.loras == (Lora(named, region=named),) and request.conditions == (Condition(named, named),)
    assert request.model == "somebody/tracker" and offline == []
    names = record.by_name(record.read(_record(tmp_path / "y.png", prompt="a <lora:/a/b:0.5>", loras=[{"source": "/x/owl.safetensors"}])))
    assert [lora.source for lora in names.loras] == ["owl", "b"] and names.prompt == "a"


OUTSIDE = ["/etc/passwd", "../secret.png", "in/../../secret.png", "C:\\secret.png", "..\\secret.png", "\\\\host\\share.png", "//host/x.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_pictures_of_its_folder_alone(tmp_path, name):
    folder = tmp_path / "theirs"
    (folder / "in").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(folder / "in" / "a.png")
    rows = [{"file_name": name, "text": "x", "concepts": []}, {"prompt": "x", "concepts": [{"phrase": "y", "references": [name]}]},
            {"file_name": "in/a.png", "text": "x", "concepts": []}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = manifest.read(folder, lambda source: None)
    assert [problem.line for problem in asked.problems] == [1, 2] and all("outside" in problem.why for problem in asked.problems)
    assert [case.picture for case in asked.cases] == [folder / "in/a.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_batch_reads_no_picture_that_a_manifest_names(medley, tmp_path):
    """Beside a request `file_name` means nothing, alone it is refused; neither is opened."""
    os.mkfifo(tmp_path / "pipe.png")
    request = Request(prompt="a fox", steps=1).json()
    rows = [{"file_name": str(tmp_path / "pipe.png"), "text": "x"}, {"file_name": "../pipe.png", "request": request}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answer = medley("batch", "m.jsonl", "--out", "out")
    assert answer.code == 3 and "file_name" in answer.err
    assert {path.parent for path in tmp_path.rglob("*.png")} == {tmp_path, tmp_path / "out/pictures"}
