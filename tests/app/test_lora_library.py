"""The library: files without words are found by what was measured of them, the rest by its words; what does not fit is not suggested."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.lora_library import Library
from composition import Refused, bundled
from composition.loras.safetensors import load_safely
from composition.profiles.behaviour import Behaviour, Probe
from composition.profiles.store import ProfileStore
from retrieval import behaviour, written
from retrieval.judge import Judge

WORDS = ("a castle", "a robot", "a guitar")  # no bundled LoRA is of one
OTHER_BASE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def nameless(tmp_path_factory):
    """(folder, home): LoRAs of Pocket without a word in header or name, and a home in which behaviours of them are kept, near the directions of WORDS."""
    folder, home = (tmp_path_factory.mktemp(name) for name in ("nameless", "home"))
    judge, store = Judge.open("pocket"), ProfileStore(home / "profiles")
    for number, words in enumerate(WORDS):
        path = folder / f"x{number}.safetensors"
        weights = load_file(bundled.path("pocket128/loras/dragon.safetensors"))
        save_file({name: value * (1.1 + number / 8) for name, value in weights.items()}, path)
        direction = behaviour.direction(lambda texts: judge.read(list(texts)).numpy(), words, behaviour.POCKET)
        direction = direction + np.random.default_rng(number).standard_normal(len(direction)) / 2 / len(direction) ** 0.5
        store.keep(Behaviour(path.stem, load_safely(path).tensor_sha256, "pocket", judge.name, Probe(("",), seeds=2),
                             tuple(map(float, direction / np.linalg.norm(direction))), 0.5, 0.5, 1.0))  # fmt: skip
    shutil.copy(folder / "x0.safetensors", folder / "copy of x0.safetensors")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    save_file({f"{OTHER_BASE}.lora_down.weight": torch.ones(4, 768), f"{OTHER_BASE}.lora_up.weight": torch.ones(320, 4)}, folder / "castle.safetensors")
    return folder, home


@pytest.fixture(autouse=True)
def without_an_encoder(monkeypatch, request):
    """The nameless ones are all of the dragon's weights, and differ in the behaviours that are kept of them."""
    if "by_weights" not in request.fixturenames:
        monkeypatch.setattr(Library, "encoder", None)


@pytest.fixture
def by_weights():
    """Asked for by a test that wants the bundled encoder."""


@pytest.fixture
def home(nameless, tmp_path, monkeypatch):
    shutil.copytree(nameless[1], tmp_path / "home")
    monkeypatch.setenv("MEDLEY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def library(nameless, home):
    library = Library("pocket", [nameless[0]])
    library.refresh()
    return library


def names(suggestions):
    return {each.candidate.name: (each.phrase, each.reasons[0].evidence) for each in suggestions}


def test_words_and_numbers(library):
    """What its behaviour tells of a nameless file, what a bundled one says, what neither does, and nothing of another base whatever its name."""
    assert names(library.suggest("a robot and a guitar")) == {"x1": ("robot", "behaviour"), "x2": ("guitar", "behaviour")}
    assert names(library.suggest("a raccoon near a castle"))["raccoon"] == ("raccoon", "trigger")
    assert set(names(library.suggest("a raccoon near a castle"))) - {"raccoon"} <= {"x0", "copy of x0"}
    assert library.suggest("a submarine") == [] and library.suggest("") == []


def test_what_is_indexed(library, nameless):
    indexed = library.write()
    assert indexed.loras == indexed.fitting + 1 and indexed.with_behaviour == indexed.fitting and indexed.with_weights in (0, indexed.fitting)
    (suggestion,) = library.suggest("a castle")
    row = library.index.get([suggestion.candidate.id])[suggestion.candidate.id]
    assert sorted(Path(file).stem for file in row.files) == ["copy of x0", "x0"] and library.path(suggestion).is_file()
    assert [card.path.name for card in library.catalogue.cards() if card.trouble] == ["broken.safetensors"]


def test_a_file_that_is_gone(library, tmp_path):
    (suggestion,) = library.suggest("a raccoon")
    library.index.upsert([replace(library.index.get([suggestion.candidate.id])[suggestion.candidate.id], files=(str(tmp_path / "no.safetensors"),))])
    with pytest.raises(Refused, match="run it again"):
        library.path(suggestion)


def test_a_folder_that_changed_is_read_again(home, tmp_path, nameless):
    folder = tmp_path / "loras"
    folder.mkdir()
    library = Library("pocket", [folder])
    library.refresh()
    assert library.suggest("a robot") == []
    shutil.copy(nameless[0] / "x1.safetensors", folder / "y.safetensors")
    library.refresh()
    assert names(library.suggest("a robot")) == {"y": ("robot", "behaviour")}
    (folder / "y.safetensors").unlink()
    library.refresh()
    assert library.suggest("a robot") == []


def test_nothing_indexed_says_what_to_do(home):
    with pytest.raises(Refused, match="medley index"):
        Library("pocket").suggest("a fox")


def test_suggest_and_auto_from_the_command_line(medley, nameless, home, tmp_path):
    suggested = medley("suggest", "a robot beside a guitar", "--lora-dir", nameless[0])
    assert suggested.code == 0, suggested.err
    assert "x1" in suggested.out and "what it does to pictures answers to 'robot'" in suggested.out
    rows = medley("suggest", "a robot beside a guitar", "--lora-dir", nameless[0], "--json").json
    assert {row["lora"]: row["for"] for row in rows} == {"x1": "robot", "x2": "guitar"} and all(Path(row["path"]).is_file() for row in rows)
    assert medley("suggest", "a submarine").out.strip() == "none of your LoRAs fits this prompt"
    drawn = medley("generate", "a robot beside a guitar", "--auto", "--lora-dir", nameless[0], "--steps", 2, "--seed", 1, "--json")
    request = drawn.json["request"]
    assert drawn.code == 0 and request["method"] == "clora-fast" and [lora["binds"] for lora in request["loras"]] == ["robot", "guitar"]
    assert "x1 at 1 for 'robot'" in drawn.err


def test_auto_adds_trigger_words_and_keeps_what_was_chosen(medley, home):
    drawn = medley("generate", "a wolf in neon", "--auto", "--lora", "wolf:0.5", "--method", "merge", "--steps", 2, "--seed", 1, "--json").json["request"]
    assert [(Path(lora["source"]).stem, lora["weight"]) for lora in drawn["loras"]] == [("wolf", 0.5), ("neon", 1.0)] and drawn["method"] == "merge"
    assert drawn["prompt"] == "a wolf in neon, neon lights"


def test_search_by_words_quotes_typos_and_behaviour(medley, nameless, home):
    def names(*words):
        return [row["name"] for row in medley("search", *words, "--lora-dir", nameless[0], "--json").json]

    assert names('"neon lights"') == ["neon"] and names('"lights neon"') == []
    assert names("racoon")[0] == "raccoon" and names("guitar")[0] == "x2"
    assert names("castle", "--family", "sd") == ["castle"] and "castle" not in names("castle", "--family", "pocket")
    assert "no LoRA of your library has the words in quotes" in medley("search", '"nothing of that kind"').out
    assert "x2" in medley("search", "guitar", "--lora-dir", nameless[0]).out


def test_a_judge_of_all_words_also_compares_what_is_written(library, monkeypatch):
    """Pocket's judge stands for one: what it reads of a LoRA's title, trigger words and tags is evidence, read again only when that changed."""
    assert all(row.text is None for row in library.index.get(library.index.ids()).values())
    library.judge.thresholds.clear()
    library.write()
    rows = {row.name: row for row in library.index.get(library.index.ids()).values()}
    captions = {card.name: written.caption([card]) for card in library.catalogue.cards()}
    assert rows["x1"].text is None and rows["castle"].text is None, "nothing is written of the one, and the other is for another base"
    assert np.allclose(rows["raccoon"].text, library.judge.read([captions["raccoon"]])[0].numpy(), atol=1e-3)
    (raccoon,) = (each for each in library.suggest("a raccoon") if each.candidate.name == "raccoon")
    assert "text" in {reason.evidence for reason in raccoon.reasons} and any("its description answers to 'raccoon'" in reason.text() for reason in raccoon.reasons)
    read, seen = library.judge.read, []
    monkeypatch.setattr(library.judge, "read", lambda texts: seen.extend(texts) or read(texts))
    library.write()
    assert not set(seen) & set(captions.values())


def test_a_file_that_says_nothing_is_found_by_its_weights(by_weights, tmp_path, monkeypatch):
    """The bundled encoder reads a LoRA that the pool never had."""
    monkeypatch.setenv("MEDLEY_HOME", str(tmp_path / "home"))
    folder = tmp_path / "loras"
    folder.mkdir()
    weights = load_file(bundled.path("pocket128/loras/dragon.safetensors"))
    save_file({name: value * 1.1 for name, value in weights.items()}, folder / "17.safetensors")
    monkeypatch.setitem(bundled.BUNDLES, "pocket", replace(bundled.BUNDLES["pocket"], loras="", profiles="nothing"))  # the dragon says what it is
    library = Library("pocket", [folder])
    library.refresh()
    assert library.encoder is not None
    (suggestion,) = library.suggest("a dragon")
    assert suggestion.candidate.name == "17" and "its weights answer to 'dragon'" in suggestion.reasons[0].text()
    assert library.suggest("a bus") == []
    monkeypatch.setattr(library.base.__class__, "factors", lambda self, path: 1 / 0)
    assert library.write().with_weights == 1, "what the index has is not read again"
