"""`medley index` and `medley lookup`, and names looked up in the catalogue when a picture is made."""

import json
import shutil

import pytest

from app import engines
from app.cli.program import app as program
from app.cli.program import run
from tests.retrieval.files import CIVITAI, beside, lora


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDLEY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def lib(tmp_path):
    path = lora(tmp_path / "lib" / "owl.safetensors", 1, {"title": "Owl [red]x[/red]\x1b[2J"})
    beside(path, ".civitai.info", CIVITAI)
    shutil.copy(path, path.with_name("copy\nof it.safetensors"))
    (tmp_path / "lib" / "page.safetensors").write_text("<html>")
    return tmp_path / "lib"


@pytest.fixture
def medley(capfd):
    import typer

    command = typer.main.get_command(program)

    def call(*words):
        words = list(map(str, words))
        code = run(lambda: command.main(words, prog_name="medley", standalone_mode=False), words)
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return call


def test_index_says_what_is_new_and_what_is_wrong(medley, lib, home):
    code, printed, _ = medley("index", lib, "--model", "none", "--duplicates")
    assert code == 0 and "3 LoRA files: 3 new, 0 changed, 0 gone" in printed and "2 read whole" in printed
    assert "1 cannot be used" in printed and "is a web page, not a model" in printed and "1 LoRA is there several times" in printed
    assert "Owl [red]x[/red]?[2J" in printed and "copy of it.safetensors" in printed and "\x1b" not in printed
    assert (home / "catalogue.sqlite").is_file() and str(home / "catalogue.sqlite") in printed
    assert "3 LoRA files: 0 new, 0 changed, 0 gone" in medley("index", lib, "--model", "none")[1]


def test_index_as_json(medley, lib):
    code, printed, _ = medley("index", lib, "--model", "none", "--headers", "--json")
    document = json.loads(printed)
    assert code == 0 and document["files"] == document["added"] == 3 and document["read"] is None and document["duplicates"] == []
    assert list(document["broken"]) == [str(lib / "page.safetensors")]
    lora(lib / "near.safetensors", 1, {})
    document = json.loads(medley("index", lib, "--model", "none", "--json", "--near")[1])
    assert document["read"]["files"] == 3 and sorted(map(len, document["duplicates"])) == [3] and document["near"] == []


def test_lookup_by_hash(medley, lib):
    medley("index", lib, "--model", "none")
    card = engines.catalogue().card(lib / "owl.safetensors")
    code, printed, _ = medley("lookup", card.autov2, card.data_sha256[:12])
    assert code == 0 and printed.count("owl.safetensors") == 2 and printed.count("copy of it.safetensors") == 2
    document = json.loads(medley("lookup", card.autov2, "--json")[1])
    assert {row["path"] for row in document[card.autov2]} == {str(lib / "owl.safetensors"), str(lib / "copy\nof it.safetensors")}
    assert document[card.autov2][1]["triggers"] == [{"word": "hoot, red owl", "origin": "sidecar"}, {"word": "<s0><s1>", "origin": "sidecar"}]
    code, printed, complaint = medley("lookup", "0123456789")
    assert code == 2 and "no LoRA file in the catalogue has the hash 0123456789" in complaint
    assert medley("lookup", "not a hash")[0] == 2


def test_a_folder_that_is_none_is_refused(medley, tmp_path):
    code, _, complaint = medley("index", tmp_path / "nothing")
    assert code == 2 and complaint == f"medley: {tmp_path / 'nothing'} is not a folder\n"


def test_without_a_catalogue_names_are_still_names(lib, home):
    catalogue = engines.catalogue()
    assert catalogue.find("owl", "none", [lib]) == lib / "owl.safetensors" and not home.exists(), "looking a name up makes no catalogue"


def test_the_engine_asks_the_catalogue(lib, monkeypatch):
    from retrieval.catalogue import Catalogue

    sources = []
    monkeypatch.setattr(Catalogue, "find", lambda self, source, model, folders, real=Catalogue.find: sources.append(source) or real(self, source, model, folders))
    with engines.open_engine("pocket", engines.EngineOptions(device="cpu", folders=(lib,))) as engine:
        assert engine.find("page").name == "page.safetensors" and engine.find("dragon").name == "dragon.safetensors"
    assert sources == ["page", "dragon"]
