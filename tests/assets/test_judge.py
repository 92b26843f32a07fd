"""The bundled judge: open-clip reads its folder without a network, it is the one the card names, and it is asked of everything."""

import hashlib
import json
import socket
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from assets.recipe import measure
from assets.recipe.loras import CARDS, FLUX, judge_phrase, stem
from assets.recipe.objects import OBJECTS, article
from assets.recipe.places import PLACES
from composition import bundled
from retrieval.judge import Judge

open_clip = pytest.importorskip("open_clip")

POCKET = Path(__file__).parents[2] / "assets/pocket128"
CLIP = POCKET / "clip"


@pytest.fixture(scope="module")
def judge():
    """Opened with every connection refused."""
    before = socket.socket.connect

    def refuse(self, address):
        raise AssertionError(f"the judge reached for {address}")

    socket.socket.connect = refuse
    try:
        made = Judge.open("pocket")
        made.read(["a fox"])
        return made
    finally:
        socket.socket.connect = before


@pytest.fixture(scope="module")
def pictures():
    pipe = StableDiffusionPipeline.from_pretrained(POCKET / "sd", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "STEPS", 10)
        return measure.paint(pipe, [f"{thing} {PLACES[place][0]}" for thing, place in ASKED])


ASKED = [("a fox", "snow"), ("a panda", "beach"), ("a pumpkin", "night"), ("a frog", "red"), ("a car", "yellow"), ("a pig", "sea")]


def test_it_is_the_one_the_card_names():
    digest = hashlib.sha256((CLIP / "open_clip_model.safetensors").read_bytes()).hexdigest()
    assert digest in (POCKET / "README.md").read_text()


def test_it_is_in_half_precision():
    with safe_open(CLIP / "open_clip_model.safetensors", "pt") as opened:
        kinds = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    assert kinds <= {"F16", "I64"}


def test_its_scores_are_open_clips_own(judge, pictures):
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    texts = ["a fox", "a picture of a car at night"]
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([prepare(p) for p in pictures]), normalize=True)
        read = model.encode_text(open_clip.get_tokenizer(f"local-dir:{CLIP}")(texts), normalize=True)
    torch.testing.assert_close(judge.cosine(pictures, texts), seen @ read.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(judge.cosine(pictures, texts), judge.cosine(pictures, texts))  # texts are remembered, not changed


def test_it_has_a_threshold_for_everything_that_pocket_is_asked():
    table = json.loads((CLIP / "presence.json").read_text())
    used = [article(n) for n in list(OBJECTS)[:48]] + [phrase for phrase, _ in PLACES.values()] + [judge_phrase(n) for n in CARDS]
    assert not [phrase for phrase in used if phrase not in table]
    assert all(false <= 0.05 for _, _, false in table.values())


def test_it_tells_pockets_pictures_apart(judge, pictures):
    """Each picture agrees most with its own object and place, for most of the six."""
    scores = judge.cosine(pictures, [thing for thing, _ in ASKED])
    grounds = judge.cosine(pictures, [PLACES[place][0] for _, place in ASKED])
    own = torch.arange(len(ASKED))
    assert (scores.argmax(1) == own).float().mean() >= 2 / 3
    assert (grounds.argmax(1) == own).float().mean() >= 2 / 3
    assert (scores.roll(1, 0).argmax(1) == own).float().mean() <= 1 / 3  # and not with a neighbour's


@pytest.mark.parametrize(("model", "names"), [("pocket", CARDS), ("pocket-flux", FLUX)])
def test_a_testbed_names_loras_that_are_there(model, names):
    bundle = bundled.BUNDLES[model]
    rows = json.loads(bundled.path(bundle.testbed).read_text())
    there = {file.stem for file in bundled.path(bundle.loras).glob("*.safetensors")}
    assert {entry["id"] for entries in rows.values() for entry in entries} == there == {stem(name) for name in names}
