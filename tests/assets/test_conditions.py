"""The recipe's conditions: pairs that belong together, scores that mean what they say, and the two stages on a small base."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from assets.recipe import conditions, controlled
from assets.recipe.__main__ import main
from assets.recipe.labelled import further_names
from assets.recipe.objects import HELD_OBJECTS
from tests import toys
from tests.assets import art

MORE = [("1f993", "zebra"), ("1f994a", "pony")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = art.draw(tmp_path_factory.mktemp("art"), more=MORE)
    return conditions.world_of(folder, 32, 20, 2, ["noto", "fluent"], 2)


def test_subjects_are_the_worlds_and_further_ones_but_none_that_is_held_out(world):
    assert {"zebra", "pony", "fox"} <= set(world.objects) and not set(HELD_OBJECTS) & set(world.objects)
    assert {(name, "noto") for name in HELD_OBJECTS} <= set(world.art)


@pytest.mark.parametrize("name", conditions.CARDS)
def test_a_pair_follows_from_its_number_and_is_of_one_size(world, name):
    own = world.objects[:20]
    first, again, other = (conditions.pair(world, own, name, number, (40, 32), 24) for number in (3, 3, 4))
    assert first.picture.shape == (32, 40, 3) and np.array_equal(first.picture, again.picture) and first.caption == again.caption
    assert first.condition.shape == ((24, 24, 3) if name == "subject" else (32, 40, 3)) and np.array_equal(first.condition, again.condition)
    assert not np.array_equal(first.picture, other.picture)


def test_a_subject_is_often_called_by_no_name(world):
    captions = [conditions.pair(world, world.objects[:20], "subject", number, (32, 32), 24).caption for number in range(60)]
    unnamed = sum(conditions.THING in caption for caption in captions)
    assert 25 < unnamed < 60


def test_a_portrait_stands_on_one_colour(world, monkeypatch):
    monkeypatch.setattr(conditions, "FILLED", (0.6, 0.9))
    rng, grounds = random.Random(0), set()
    for _ in range(12):
        picture = conditions.portrait(world, "fox", "noto", 32, rng)
        corners = {picture.getpixel(place) for place in ((0, 0), (31, 0), (0, 31), (31, 31))}
        assert picture.size == (32, 32) and len(corners) == 1 and len(picture.getcolors()) > 1
        grounds |= corners
    assert (255, 255, 255) in grounds and len(grounds) > 1


def test_sizes_are_whole_tokens_and_most_pairs_have_the_bases_own():
    for side, unit in ((64, 8), (128, 16)):
        made = dict(conditions.sizes(200, side, unit))
        assert sum(made.values()) == 200 and max(made, key=made.get) == (side, side)
        assert all(length % unit == 0 for size in made for length in size)
        new = {(side * wide // 8, side * high // 8) for wide, high in conditions.NEW_SHAPES}
        assert not new & set(made)


def square(at, side=64, of=24, ground=(200, 200, 200), colour=(200, 30, 30)):
    picture = Image.new("RGB", (side, side), ground)
    ImageDraw.Draw(picture).rectangle((*at, at[0] + of, at[1] + of), fill=colour)
    return picture


def test_scores_of_what_keeps_to_its_condition_and_of_what_does_not():
    edges = [Image.new("RGB", (64, 64)) for _ in range(3)]
    for picture, at in zip(edges, (20, 21, 40), strict=True):
        ImageDraw.Draw(picture).line((at, 5, at, 60), fill="white")
    assert controlled.f1(edges[0], edges[0]) == 1 and controlled.f1(edges[0], edges[1]) == 0
    assert controlled.f1(edges[0], edges[1], 1) == 1 and controlled.f1(edges[0], edges[2], 1) == 0
    wanted, same, moved = square((10, 10)), square((10, 10), colour=(180, 60, 50)), square((30, 10))
    assert controlled.miou(same, wanted) == 1  # another red is still the nearest
    assert controlled.miou(moved, wanted) < 0.6 < controlled.miou(wanted, wanted) == 1
    shared, each, all_of_it = 25 * 5, 25 * 25, 64 * 64  # pixels: the two squares overlap by five columns
    both = [shared / (2 * each - shared), (all_of_it - 2 * each + shared) / (all_of_it - shared)]
    assert controlled.miou(moved, wanted) == pytest.approx(np.mean(both))


def test_an_interval_holds_the_mean_and_narrows_with_more_pictures():
    values = [0.0, 1.0] * 50
    mean, low, high = controlled.interval(values)
    assert low < mean == 0.5 < high and high - low < controlled.interval(values[:10])[2] - controlled.interval(values[:10])[1]


@pytest.mark.slow
def test_both_stages_run_on_a_small_base(tmp_path, monkeypatch):
    """The files are small, say what they are, and are what the figures are of."""
    art.draw(tmp_path / "work/art", more=MORE)
    toys.flux().save_pretrained(tmp_path / "out/flux")
    monkeypatch.setattr(controlled, "STEPS", 2)
    judge = type("Judge", (), {"present": lambda self, pictures, phrases: torch.ones(len(pictures), len(phrases), dtype=torch.bool)})()
    monkeypatch.setattr("assets.recipe.__main__.Judge.open", lambda *_: judge)
    for stage in ("flux-conditions", "flux-conditions-measure"):
        monkeypatch.setattr(sys, "argv", [
            "recipe", stage, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--objects", "20", "--places", "2", "--variants", "2",
            "--condition-steps", "2", "--pairs", "12", "--measured", "0.01", "--vendors", "noto,fluent"])  # fmt: skip
        main()
    for name, card in conditions.CARDS.items():
        with safe_open(tmp_path / f"out/flux-conditions/{name}.safetensors", "pt") as opened:
            said = opened.metadata()
        assert (said["condition.kind"], said["condition.annotator"], said["title"]) == (card.kind, card.annotator, card.title)
    figures = json.loads((tmp_path / "work/figures-conditions.json").read_text())
    assert set(figures) == {f"{name}, {where}" for name in conditions.CARDS for where in ("own size", "new sizes")} | {"canny and subject", "canny beside layout", "layout beside canny"}
    assert figures["subject, own size"]["subject with"] == [1.0, 1.0, 1.0]


def test_further_names_are_those_of_the_art(tmp_path):
    assert set(further_names(art.draw(tmp_path, more=MORE))) == {"zebra", "pony"}
