"""The pool: who is held out from whom, what captions and prompts say, and that it goes on where it stopped."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from assets.recipe import looks, pool
from assets.recipe.art import ART
from tests import toys
from tests.assets import art

LABELS = ["zebra", "pony", "kiwi fruit", "fruit bowl", "anvils", "anvil", "ladder", "quill", "violet", "dog house", "lamp", "nest"]


@pytest.fixture
def many(monkeypatch):
    """The names of art that has enough of them."""
    monkeypatch.setattr(pool, "further_names", lambda _: {f"thing{chr(97 + i // 26)}{chr(97 + i % 26)}q": f"{i:x}" for i in range(450)})


def test_who_is_held_out(many):
    rows = pool.entries("art")
    splits = {split: [row for row in rows if row.split == split] for split in ("train", "seen", "unseen")}
    assert len(rows) >= 300 and len(splits["train"]) >= 300 and len(splits["seen"]) >= 30 and len(splits["unseen"]) >= 30
    taught = {row.concept for row in splits["train"]}
    assert not taught & {row.concept for row in splits["unseen"]} and taught >= {row.concept for row in splits["seen"]}
    for row in splits["seen"]:
        others = [other for other in splits["train"] if other.concept == row.concept]
        assert row.vendor not in {other.vendor for other in others} and row.form not in {other.form for other in others}
        assert row.number > min(other.number for other in others)
    assert {row.category for row in splits["train"]} == {row.category for row in splits["seen"]} == {"object", "style", "place"}
    assert [row.number for row in rows] == list(range(len(rows))) and rows == pool.entries("art")
    for part in (rows[:120], rows[120:240], rows[240:]):  # whatever part is made has something of each
        assert min(Counter(row.split for row in part).values()) >= 3


def test_no_prompt_that_is_searched_with_was_learned_and_none_names_two(many):
    rows = pool.entries("art")
    captions = {caption for row in rows for _, _, caption in pool.lines(row)}
    queries = [query for row in rows for query in pool.queries(row)]
    assert not captions & set(queries)
    for row in rows:
        assert all(row.phrase in query for query in pool.queries(row)) and all(row.trigger in line.caption for line in pool.lines(row))
    strange = [row for row in rows if row.trigger not in (row.concept, row.phrase)]
    assert len(rows) / 6 < len(strange) < len(rows) / 4
    assert len({row.trigger for row in strange}) == len(strange)


def test_concepts_share_no_word_with_one_another_nor_with_the_world(tmp_path):
    art.draw(tmp_path, more=[(f"1f99{i:x}f", label) for i, label in enumerate(LABELS)])
    names = pool.concepts(tmp_path)
    assert set(names) == {"zebra", "pony", "kiwi fruit", "anvils", "ladder", "quill", "violet", "lamp", "nest"}


def test_art_that_is_too_small_is_refused(tmp_path):
    art.draw(tmp_path, more=[("1f993", "zebra")])
    with pytest.raises(ValueError, match="names 1 concepts.*needs 408"):
        pool.entries(tmp_path)


@pytest.mark.parametrize("name", looks.STYLES)
def test_a_style_changes_every_picture_and_keeps_its_form(name):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    before = picture.copy()
    drawn = looks.STYLES[name][1](picture)
    assert drawn.shape == picture.shape and drawn.dtype == np.uint8 and not np.array_equal(drawn, picture) and np.array_equal(picture, before)


@pytest.fixture
def small(tmp_path):
    """A toy base, art, and a few LoRAs to train: one of each category."""
    folder = art.draw(tmp_path / "art", more=[(f"1f99{i:x}f", label) for i, label in enumerate(LABELS)])
    rows = pool.entries(folder, pool.Sizes(1, 2, 1, 3))
    some = [next(row for row in rows if row.category == category) for category in ("object", "style", "place")]
    plan = replace(pool.PLAN, rank=2, steps=3, batch=1, half=False, targets=("attention",))

    def make(out, **more):
        return pool.make(toys.sd(), folder, some, tmp_path / out, tmp_path / f"{out}-work", plan=plan, together=2, scenes=3, report=lambda _: None, **more)

    return make, some


def test_pictures_are_those_that_the_lines_name(tmp_path):
    folder = art.draw(tmp_path, more=[(f"1f99{i:x}f", label) for i, label in enumerate(LABELS)])
    rows = pool.entries(folder, pool.Sizes(1, 2, 1, 3))
    world = pool.world_of(folder, rows, 32)
    grounds = dict(world.grounds)
    for category in ("object", "style", "place"):
        entry = next(row for row in rows if row.category == category)
        drawn = pool.pictures(world, entry, 4)
        assert drawn.shape == (4, 32, 32, 3) and np.array_equal(drawn, pool.pictures(world, entry, 4)) and world.grounds.keys() == grounds.keys()
        assert len({picture.tobytes() for picture in drawn}) == 4
    assert all(entry.vendor in ART for entry in rows)


def test_it_stops_goes_on_and_says_nothing_in_its_files(small, tmp_path):
    make, some = small
    assert make("whole", part=(2, 2)) and [file.stem for file in (tmp_path / "whole").glob("*.safetensors")] == [some[2].stem]
    assert make("whole", part=(1, 2))
    calls = iter(range(100))
    assert not make("parts", over=lambda: next(calls) == 2)  # in the middle of the first group
    assert not list((tmp_path / "parts").glob("*.safetensors")) and len(list((tmp_path / "parts-work").iterdir())) == 1
    assert not make("parts", over=lambda: len(list((tmp_path / "parts").glob("*.safetensors"))) == 2)  # after it
    manifest = json.loads((tmp_path / "parts/manifest.json").read_text())
    assert [row["file"] for row in manifest["loras"]] == [f"{entry.stem}.safetensors" for entry in some[:2]]
    assert make("parts") and not list((tmp_path / "parts-work").iterdir())
    for entry in some:
        whole, parts = (tmp_path / out / f"{entry.stem}.safetensors" for out in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
        with safe_open(parts, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    rows = json.loads((tmp_path / "parts/manifest.json").read_text())["loras"]
    assert [row["concept"] for row in rows] == [entry.concept for entry in some]
    assert set(rows[0]) == {"file", "name", "category", "concept", "phrase", "trigger", "split", "art", "form", "captions", "queries"}
    assert rows[0]["captions"] and rows[0]["split"] == some[0].split
