"""Near-duplicates by exact inner products, and the pairs worth comparing by sketches."""

import threading

import pytest
import torch

from composition.refusal import Cancelled, Refused
from retrieval import duplicates
from retrieval.catalogue import Catalogue
from tests.hostile import seeds
from tests.retrieval.files import aged, lora


def pair(seed, noise=0.0, dtype=torch.float32, extra=0, scale=1.0):
    """The same random LoRA in other writings: with noise, another dtype, ranks of zeros, another strength."""
    rng, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    tensors = {}
    for name in (seeds.Q, seeds.K):
        inputs = 16 if name == seeds.Q else 8
        down, up = torch.randn(2, inputs, generator=rng), torch.randn(16, 2, generator=rng) * scale
        down = down + noise * torch.randn(down.shape, generator=other)
        tensors[f"{name}.lora_down.weight"] = torch.cat([down, torch.zeros(extra, inputs)]).to(dtype)
        tensors[f"{name}.lora_up.weight"] = torch.cat([up, torch.zeros(16, extra)], 1).to(dtype)
    return tensors


@pytest.fixture
def cards(tmp_path):
    lib = tmp_path / "lib"
    for name, tensors in {"a": pair(1), "half": pair(1, dtype=torch.float16), "padded": pair(1, extra=3), "strong": pair(1, scale=2.5), "epoch": pair(1, noise=0.05),
                          "cousin": pair(1, noise=1.0), "other": pair(2), "none": pair(3, scale=0.0), "no lora": {"x": torch.ones(2)}}.items():  # fmt: skip
        lora(lib / f"{name}.safetensors", tensors=tensors)
    lora(lib / "same.safetensors", tensors=pair(1), metadata={"title": "the same tensors"})
    catalogue = Catalogue(tmp_path / "catalogue.sqlite")
    catalogue.scan([lib])
    catalogue.read()
    return catalogue.cards()


def test_the_same_updates_are_near_however_they_are_written(cards):
    rows = duplicates.near(cards)
    names = {frozenset((row.first.name, row.second.name)): row.cosine for row in rows}
    group = ["a", "half", "padded", "strong", "epoch"]
    assert set(names) == {frozenset((x, y)) for x in group for y in group if x < y}
    for pair_names, cosine in names.items():
        assert 0.98 < cosine < 1 - 1e-5 if "epoch" in pair_names else cosine == pytest.approx(1, abs=1e-6)
    assert [row.cosine for row in rows] == sorted((row.cosine for row in rows), reverse=True)
    loose = duplicates.near(cards, 0.3)
    assert any("cousin" in (row.first.name, row.second.name) for row in loose) and not any("none" in (row.first.name, row.second.name) for row in loose)


def test_pairs_may_be_chosen_and_too_many_are_refused(cards, monkeypatch):
    by_name = {card.name: card for card in cards}
    pairs = [(by_name["strong"].tensor_sha256, by_name["a"].tensor_sha256), (by_name["a"].tensor_sha256, "not there")]
    assert len(duplicates.near(cards, pairs=pairs)) == 1
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        duplicates.near(cards, cancel=cancel)
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 5)
    with pytest.raises(Refused, match="pairs, and at most 5 are compared"):
        duplicates.near(cards)


def test_little_memory_changes_nothing_and_files_that_went_are_passed_over(cards, monkeypatch):
    before = [(row.first.name, row.second.name, row.cosine) for row in duplicates.near(cards)]
    monkeypatch.setattr(duplicates, "HELD", 1)
    assert [(row.first.name, row.second.name, row.cosine) for row in duplicates.near(cards)] == before
    card = next(card for card in cards if card.name == "half")
    card.path.unlink()
    rows = duplicates.near(cards)
    assert rows and not any("half" in (row.first.name, row.second.name) for row in rows)
    aged(card.path.with_name("padded.safetensors")).write_bytes(b"broken")
    assert not any("padded" in (row.first.name, row.second.name) for row in duplicates.near(cards))


def test_likely_pairs_are_those_whose_sketches_are_alike():
    rng = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, 40, generator=rng) / 8**0.5, torch.randn(30, 8, generator=rng) / 8**0.5
    updates = {f"{index}": {f"layer {layer}": torch.randn(40, 30, generator=rng) for layer in range(40)} for index in range(6)}
    updates["near 2"] = {layer: 3 * update + 0.3 * torch.randn(40, 30, generator=rng) for layer, update in updates["2"].items()}
    updates["half of 4"] = dict(list(updates["4"].items())[:20])
    updates["elsewhere"] = {f"other {layer}": update for layer, update in updates["1"].items()}
    sketches = {name: {layer: left @ update @ right for layer, update in layers.items()} for name, layers in updates.items()}
    assert duplicates.likely(sketches) == [("2", "near 2")]
    assert set(duplicates.likely(sketches, 0.8)) == {("2", "near 2"), ("4", "half of 4")}
    assert duplicates.likely({}) == []
