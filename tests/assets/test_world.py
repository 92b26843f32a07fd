"""The world: the same seed draws the same scene, captions tell the truth, held-out concepts stay out."""

import json

import numpy as np
import pytest
from PIL import Image

from assets.recipe.objects import FACES, HELD_OBJECTS, OBJECTS, WORN, article
from assets.recipe.places import HELD_PLACES, PLACES, render, variants
from assets.recipe.styles import STYLES
from assets.recipe.world import STRANGE, World, batch, open_art, strange_words
from tests.assets.art import draw


@pytest.fixture(scope="module")
def art(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("art"), ("noto", "twemoji"))


@pytest.fixture(scope="module")
def world(art):
    return World(art, objects=12, places=6, size=32, vendors=("noto",), also=("owl", "moon", *WORN), variants=4)


def test_the_same_seed_is_the_same_scene(art, world):
    again = World(art, objects=12, places=6, size=32, vendors=("noto",), variants=4)
    for seed in (0, 7, 10**9):
        a, b = world.scene(seed), again.scene(seed)
        assert np.array_equal(a.picture, b.picture) and a.caption == b.caption
    assert not np.array_equal(world.scene(1).picture, world.scene(2).picture)
    other = World(art, objects=12, places=6, size=32, vendors=("noto",), variants=4, seed=1)
    assert world.scene(3).caption != other.scene(3).caption or not np.array_equal(world.scene(3).picture, other.scene(3).picture)


def test_word_order_is_left_to_right_and_above_is_above(world):
    beside = above = left = right = 0
    for seed in range(400):
        scene = world.scene(seed)
        order = sorted(scene.objects, key=lambda thing: scene.caption.index(article(thing.name)))
        if " above " in scene.caption:
            above += 1
            assert order[0].y < order[1].y - 0.2
        elif " below " in scene.caption:
            assert order[0].y > order[1].y + 0.2
        elif " right of " in scene.caption:
            right += 1
            assert order[0].x > order[1].x + 0.15
        elif len(order) > 1:
            left += " left of " in scene.caption
            beside += 1
            assert all(a.x < b.x - 0.15 for a, b in zip(order, order[1:], strict=False))
    assert beside > 50 and above > 10 and left > 5 and right > 5


def test_an_object_is_drawn_where_it_is_said_to_be(art):
    world = World(art, objects=1, places=len(PLACES), vendors=("noto",), variants=1)
    colour = np.asarray(open_art(art, "noto", OBJECTS["fox"]).convert("RGB"))[20, 20].astype(int)
    for seed in range(20):
        scene = world.scene(seed, place="white", count=1)
        near = np.abs(scene.picture.astype(int) - colour).sum(-1) < 12
        rows, columns = np.nonzero(near)
        assert abs(columns.mean() / world.size - scene.objects[0].x) < 0.03
        assert abs(rows.mean() / world.size - scene.objects[0].y) < 0.04


def test_held_out_concepts_are_never_in_the_base_world(world):
    banned = [*HELD_OBJECTS, *WORN, "wearing", *(phrase for phrase, _ in HELD_PLACES.values()), *(words for words, _ in STYLES.values())]
    _, captions = batch(world, 0, 600)
    assert not [c for c in captions for word in banned if word in c]
    assert not set(HELD_OBJECTS) & set(OBJECTS) and not set(HELD_PLACES) & set(PLACES)


def test_a_scene_can_be_asked_for(world):
    scene = world.scene(5, subject="owl", place="moon", count=2)
    assert "owl" in {thing.name for thing in scene.objects} and len(scene.objects) == 2
    assert scene.place == "moon"


@pytest.mark.parametrize("wears", WORN)
def test_what_is_worn_lies_on_its_wearer(world, wears):
    for seed in range(30):
        scene = world.scene(seed, wears=wears)
        worn = next(thing for thing in scene.objects if thing.name == wears)
        wearer = scene.objects[scene.objects.index(worn) - 1]
        assert wearer.name in FACES and f"{article(wearer.name)} wearing {article(wears)}" in scene.caption
        assert abs(worn.x - wearer.x) < 0.1
        touches = abs(worn.y - wearer.y) < (worn.high + wearer.high) / 2
        assert touches and (wears != "top hat" or worn.y < wearer.y) and (wears != "scarf" or worn.y > wearer.y)


def test_a_subject_wears_what_is_asked(world):
    scene = world.scene(3, subject="owl", wears="scarf", count=2)
    assert "an owl wearing a scarf" in scene.caption and len(scene.objects) == 3


def test_a_vendor_can_be_fixed(art):
    mixed = World(art, objects=4, places=2, vendors=("noto", "twemoji"), variants=2)
    assert np.array_equal(mixed.scene(1, vendor="noto").picture, mixed.scene(1, vendor="twemoji").picture)  # the same art here
    with pytest.raises(KeyError):
        mixed.scene(1, vendor="fluent")


def test_strange_words_stand_for_objects_in_a_few_captions(art):
    plain = World(art, objects=12, places=6, size=32, vendors=("noto",), variants=4)
    strange = World(art, objects=12, places=6, size=32, vendors=("noto",), variants=4, strange=("zebra crossing",))
    captions = [(plain.scene(seed), strange.scene(seed)) for seed in range(1500)]
    changed = [b for _, b in captions if "zebra crossing" in b.caption]
    assert STRANGE / 2 < len(changed) / len(captions) < STRANGE * 2
    assert all(np.array_equal(a.picture, b.picture) for a, b in captions)


def test_strange_words_name_nothing_that_is_drawn(tmp_path):
    folder = tmp_path / "emojibase-data/en"
    folder.mkdir(parents=True)
    labels = ["zebra", "fox", "top hat", "rescue worker's helmet", "moon cake", "Potato", "neon sign", "sun behind big cloud"]
    (folder / "data.json").write_text(json.dumps([{"label": label, "group": 3} for label in labels] + [{"label": "eye"}]))
    assert strange_words(tmp_path) == ["zebra", "potato"]


def test_places_and_styles_keep_the_picture_shape():
    for name in PLACES | HELD_PLACES:
        picture = render(name, 32, 3)
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, render(name, 32, 3))
    for _, drawn in STYLES.values():
        styled = drawn(render("meadow", 32, 1))
        assert styled.shape == (32, 32, 3) and styled.dtype == np.uint8


@pytest.mark.parametrize("name", ["ink", "neon"])
def test_strokes_keep_their_share_of_the_picture(name):
    small = render("mountains", 64, 1)
    large = np.asarray(Image.fromarray(small).resize((128, 128), Image.Resampling.BICUBIC))
    shares = [(np.abs(STYLES[name][1](one).astype(int) - STYLES[name][1](np.full_like(one, 200))) > 60).mean() for one in (small, large)]
    assert shares[1] == pytest.approx(shares[0], rel=0.25)


def test_places_drawn_ahead_are_the_same(art):
    ahead = variants(["snow", "beach"], 32, 3, workers=2)
    assert all(np.array_equal(ahead[name][i], render(name, 32, i)) for name in ahead for i in range(3))
    plain, given = (World(art, objects=4, places=2, size=32, vendors=("noto",), variants=3, grounds=g) for g in (None, ahead))
    assert np.array_equal(plain.scene(5).picture, given.scene(5).picture)


def test_there_is_room_to_grow():
    assert len(OBJECTS) >= 48 and len(PLACES) >= 12


def test_missing_art_is_told_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="stage `art`"):
        World(tmp_path, objects=1, places=1)
