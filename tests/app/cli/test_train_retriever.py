"""`medley train retriever`: it learns from a library's words what weights do, says how well, and keeps nothing that finds no more than chance."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from app.cli import retriever_trainer
from app.lora_library import Library
from composition import Refused
from retrieval.judge import Judge
from retrieval.ridge import opened

LAYERS = [f"unet.{side}_blocks.1.attentions.0.transformer_blocks.0.attn2.to_{part}" for side in ("down", "up") for part in ("k", "v")]
LORAS = 60


@pytest.fixture(scope="module")
def judge():
    return Judge.open("pocket")


def write(folder, names, words, judge):
    """Files without a word, whose updates follow the judge's text vector of a name, with sidecars that say the words."""
    folder.mkdir()
    rng = torch.Generator().manual_seed(3)
    vectors = judge.read(names)
    maps = {layer: (torch.randn(vectors.shape[1], 64, generator=rng), torch.randn(1, 64, generator=rng)) for layer in LAYERS}
    shapes = Library("pocket").base.components["unet"]
    for number, (vector, said) in enumerate(zip(vectors, words, strict=True)):
        tensors = {}
        for layer, (up, down) in maps.items():
            rows, columns = shapes.get_submodule(layer.removeprefix("unet.")).weight.shape
            tensors[f"{layer}.lora_A.weight"] = down[:, :columns].repeat(1, 1 + columns // 64)[:, :columns].contiguous()
            tensors[f"{layer}.lora_B.weight"] = (vector @ up).repeat(1 + rows // 64)[:rows, None].contiguous()
        save_file(tensors, folder / f"{number:03d}.safetensors")
        if said:
            (folder / f"{number:03d}.json").write_text(json.dumps({"activation text": said}))
    return folder


@pytest.fixture(scope="module")
def names(judge):
    return sorted(judge.thresholds)[:: max(1, len(judge.thresholds) // LORAS)][:LORAS]


@pytest.fixture(scope="module")
def lib(names, judge, tmp_path_factory):
    return write(tmp_path_factory.mktemp("pool") / "lib", names, names, judge)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDLEY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def without_the_bundled(monkeypatch):
    """They have 91 layers each and follow nothing of this: time alone."""
    examples = Library.examples
    monkeypatch.setattr(Library, "examples", lambda self, side: [example for example in examples(self, side) if len(opened(example.lora)) == len(LAYERS)])


@pytest.mark.parametrize("reads", ["factors", "sketches"])
def test_a_library_is_learned_from_and_its_files_are_found_by_weights(medley, lib, names, reads, monkeypatch):
    """Of a large library sketches are read in place of factors."""
    if reads == "sketches":
        monkeypatch.setattr(retriever_trainer, "EXACT", 0)
    answer = medley("train", "retriever", lib)
    assert answer.code == 0, answer.err
    printed = answer.out
    first, five = map(int, re.search(r"weights\D+(\d+) % \(.*?\)\D+(\d+) %", printed).groups())
    assert five > 40 and first <= five and "chance" in printed and f"{LORAS + 18} LoRAs for pocket are found by their weights" in printed
    library = Library("pocket", [lib])
    assert library.encoder is not None and (library.encoder.settings.base, library.encoder.settings.reads) == ("pocket", reads)
    own = {row.id: row for row in library.index.get(library.index.ids()).values() if row.name == "007"}
    assert all(row.weight is not None for row in own.values()) and len(own) == 1
    hits = library.index.search({"weight": library.encoder.read(library.judge.read([names[7]])).numpy()[0]}, "", k=5)
    assert own.keys() & {hit.id for hit in hits}


def test_words_that_say_nothing_of_the_weights_leave_nothing(medley, names, judge, tmp_path, home):
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1)).tolist()
    lib = write(tmp_path / "lib", names, [names[number] for number in order], judge)
    answer = medley("train", "retriever", lib)
    code, printed, error = answer.code, answer.out, answer.err
    assert code == 2 and "chance" in printed and "no encoder was kept" in error and "--no-check" in error
    assert not Library("pocket", [lib]).trained.exists()


def test_what_cannot_be_learned_from_is_refused(medley, lib, tmp_path):
    answer = medley("train", "retriever")
    code, error = answer.code, answer.err
    assert code == 2 and f"needs {retriever_trainer.LEAST} at least" in error and "--behaviour" in error
    answer = medley("train", "retriever", tmp_path / "no")
    code, error = answer.code, answer.err
    assert code == 2 and "is not a folder" in error


def test_a_model_without_known_layers_is_refused(monkeypatch):
    from dataclasses import replace

    from app.lora_base import Base

    monkeypatch.setattr(Library, "base", replace(Base.of("pocket"), components={}))
    with pytest.raises(Refused, match="its LoRAs' weights cannot be read"):
        retriever_trainer.learn(retriever_trainer.RetrieverConfig("pocket", (), "pocket"), None)
