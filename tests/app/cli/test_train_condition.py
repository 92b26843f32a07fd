"""`medley train condition` as a user meets it: photos and an annotator in, a condition LoRA out that --control finds; what is refused."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

from tests import toys


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "flux"
    toys.flux().save_pretrained(folder)
    return folder


@pytest.fixture
def boxes(tmp_path) -> Path:
    """Three pictures of a box, with captions."""
    folder = tmp_path / "boxes"
    folder.mkdir()
    for index in range(3):
        picture = Image.new("RGB", (64, 48), (250, 240 - 20 * index, 230))
        ImageDraw.Draw(picture).rectangle((10 + 3 * index, 8, 40 + 3 * index, 38), fill="navy")
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a box")
    return folder


@pytest.fixture
def train(medley, flux, boxes):
    """`medley train condition` of the boxes on the toy, two steps of one pair; more arguments after it."""

    def call(*more: object, images: object = boxes):
        return medley("train", "condition", "--images", images, "--model", flux, "--steps", 2, "--batch", 1, "--rank", 2,
                      "--size", 16, "--sides", "24,32", "--preview-every", 0, *more)

    return call


def test_photos_and_an_annotator_make_a_condition_lora_that_control_finds(train, medley, flux, boxes, tmp_path):
    said = train("--annotator", "canny", "--title", "My edges", "--preview-every", 2)
    assert said.code == 0, said.err
    assert "3 pictures, 3 captions, conditions by canny" in said.out and "2 steps of 1 pairs" in said.out
    assert "canny: applied 28/28 tensors" in said.out
    folder = tmp_path / "home/loras"
    assert sorted(path.name for path in (folder / "canny-previews").iterdir()) == ["00000.png", "00002.png"]
    assert not list(folder.glob("*.training")) and not list(folder.glob("*.part"))
    with safe_open(folder / "canny.safetensors", "pt") as opened:
        told = opened.metadata()
    assert (told["title"], told["condition.kind"], told["condition.annotator"], told["condition.size"]) == ("My edges", "spatial", "canny", "16")
    assert str(tmp_path) not in "".join(told.values())
    said = medley("generate", "a box", "--control", f"canny={boxes / '0.png'}", "--model", flux, "--steps", 2, "--size", "32x32")
    assert said.code == 0, said.err
    again = train("--annotator", "canny")
    assert again.code == 2 and "not overwritten" in again.err


def test_a_subject_is_learned_from_a_second_folder(train, boxes, tmp_path):
    assert "pictures of it by itself" in train("--annotator", "canny", "--kind", "subject").err
    said = train("--conditions", boxes, "--kind", "subject", "--name", "thing", "--out", "made")
    assert said.code == 0, said.err
    with safe_open(tmp_path / "made/thing.safetensors", "pt") as opened:
        told = opened.metadata()
    assert told["condition.kind"] == "subject" and told["condition.annotator"] == ""


@pytest.mark.parametrize(("more", "words"), [
    ((), "--annotator NAME, or --conditions DIR"), (("--annotator", "cany"), "canny"), (("--annotator", "canny", "--kind", "pose"), "spatial or subject"),
    (("--annotator", "canny", "--size", 17), "multiple of"), (("--annotator", "canny", "--bias", 50), "--bias"),
    (("--annotator", "canny", "--sides", "big"), "--sides"), (("--annotator", "canny", "--drop", 1), "shares"),
    (("--annotator", "canny", "--dtype", "float16"), "float32 or bfloat16"), (("--annotator", "canny", "--name", "../x"), "--name")])
def test_a_wrong_flag_is_one_line_that_names_it(train, more, words):
    said = train("--name", "x", *more) if not more else train(*more)
    assert said.code == 2 and words in said.err
    assert said.err.startswith("medley: ") and said.err.count("\n") == 1


def test_what_cannot_be_learned_from_is_refused(train, medley, toy, boxes):
    assert "no folder nowhere" in train("--annotator", "canny", images="nowhere").err
    assert "--images photos --annotator canny" in medley("train", "condition").err
    said = train("--annotator", "canny", "--model", toy.model)
    assert said.code == 2 and "FLUX" in said.err
