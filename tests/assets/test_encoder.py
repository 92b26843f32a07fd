"""The encoder stage on a few bundled LoRAs in the pool's form: who is learned from, what is looked for among what, and that looks are kept."""

import json
import shutil

import numpy as np
import pytest
import torch

from assets.recipe import encoder
from composition import bundled
from retrieval.judge import Judge
from retrieval.linear import LinearEncoder
from retrieval.training import Plan

SPLITS = {"dragon": "train", "owl": "train", "ink": "train", "wolf": "train", "moon": "unseen", "raccoon": "seen"}
SMALL = {"width": 32, "depth": 1, "heads": 2, "side": 8, "focus": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pool of six; the raccoon is held out of a concept that training has, by the owl's name."""
    folder, rows = tmp_path_factory.mktemp("pool"), []
    for number, (name, split) in enumerate(SPLITS.items()):
        shutil.copy(bundled.path(f"pocket128/loras/{name}.safetensors"), folder / f"p{number:03d}.safetensors")
        concept = "owl" if name == "raccoon" else name
        rows.append({"file": f"p{number:03d}.safetensors", "name": f"{name} noto", "category": "object", "concept": concept, "phrase": f"a {concept}",
                     "trigger": concept if number % 2 else "xyz", "split": split, "captions": [f"a {concept} in the snow", f"{concept}, snow"],
                     "queries": [f"a {concept}", f"a {concept} at night"]})  # fmt: skip
    (folder / encoder.MANIFEST).write_text(json.dumps({"loras": [*rows, {"file": "gone.safetensors"}]}))
    return folder


def test_who_is_learned_from_and_what_is_looked_for(folder, tmp_path):
    judge, rows = Judge.open("pocket"), encoder.rows_of(folder)
    assert [row["file"] for row in rows] == [f"p{number:03d}.safetensors" for number in range(6)]
    taught = encoder.lessons([row for row in rows if row["split"] == "train"], judge, None)
    assert taught.groups.tolist() == [0, 1, 2, 3]
    assert torch.bincount(taught.of).tolist() == [2, 4, 2, 4]  # captions of an invented trigger do not name the concept
    base = bundled.path("pocket128/sd")
    loras, read = encoder.updates(folder, rows, base), encoder.sketches(folder, rows, base)
    encoder.fitted(rows, loras, judge, None).save(tmp_path / "encoder")
    model = LinearEncoder.open(tmp_path / "encoder")
    assert (model.settings.base, model.settings.judge, model.settings.loras) == ("pocket", judge.name, 4)
    other = encoder.transformed(rows, read, judge, None, None, Plan(steps=2, batch=4), lambda line: None, **SMALL)
    by_weights = {"weights": encoder.Weights(model.encode(loras), model.read), "transformer": encoder.Weights(other.encode(read), other.read)}
    table = encoder.figures(rows, judge, None, by_weights)
    assert list(table) == ["seen: 1 LoRAs, 3 distractors, 2 prompts", "unseen: 1 LoRAs, 4 distractors, 2 prompts"]  # no other owl beside the raccoon
    for split in table.values():
        assert {"chance", "file names", "weights", "transformer"} <= split.keys() and set(split["weights"]) == {"R@1", "R@5", "MRR", "nDCG@10"}


def test_looks_are_drawn_once(folder, tmp_path, monkeypatch):
    judge, rows = Judge.open("pocket"), encoder.rows_of(folder)[:2]
    drawn = []

    def seen(engine, see, probe, lora=None):
        drawn.append(lora and lora.name)
        return np.random.default_rng(len(drawn)).standard_normal((4, 256))

    monkeypatch.setattr(encoder.measuring, "seen", seen)
    first = encoder.looks(None, judge, folder, rows, tmp_path / "looks", drawn.append)
    assert drawn == [None, "base: drawn", "p000", "p000: drawn", "p001", "p001: drawn"]
    second = encoder.looks(None, judge, folder, rows, tmp_path / "looks", drawn.append)
    assert len(drawn) == 6 and all(np.array_equal(*pair) for pair in zip(first, second, strict=True))
    assert np.allclose(np.linalg.norm(first.directions, axis=1), 1) and np.allclose(np.linalg.norm(first.pictures, axis=1), 1)
