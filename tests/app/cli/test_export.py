"""`medley export`: one LoRA file of several, which makes the same picture as the several do."""

import numpy as np
import pytest
from PIL import Image

from tests.reference import psnr


@pytest.fixture
def exported(medley, toy):
    """`medley export` of two of the toy's LoRAs."""

    def call(file, *more, loras=("fox:0.8", "owl"), method="ssr"):
        named = [word for lora in loras for word in ("--lora", lora)]
        return medley("export", file, *named, "--method", method, "--model", toy.model, "--lora-dir", toy.loras, *more)

    return call


def picture(medley, toy, folder, *more):
    answer = medley("generate", "a fox and an owl", "--model", toy.model, "--lora-dir", toy.loras, "--steps", 3, "--size", 32, "--seed", 4, "--out", folder, *more)
    assert answer.code == 0, answer.err
    return np.asarray(Image.open(f"{folder}/0000.png"))


def test_the_file_makes_the_picture_that_the_set_makes(medley, toy, exported, tmp_path):
    answer = exported("set.safetensors", "--steps", 3, "--size", 32)
    assert answer.code == 0, answer.err
    assert "fox + owl (SSR-Merge)" in answer.out and "layers of rank 8" in answer.out and "--lora set.safetensors" in answer.out
    one = picture(medley, toy, "one", "--lora", "set.safetensors")
    several = picture(medley, toy, "several", "--lora", "fox:0.8", "--lora", "owl", "--method", "ssr")
    assert psnr(one, several) > 45 > 30 > psnr(one, picture(medley, toy, "none"))
    shown = medley("inspect", tmp_path / "set.safetensors")
    assert "foxword, owlword" in shown.out and "kohya" in shown.out


def test_fewer_ranks_as_json(exported, tmp_path):
    document = exported("small", "--rank", 2, "--json", "--title", "Two  in one", "--precision", "float32", method="merge").json
    assert document["file"] == "small.safetensors" and document["title"] == "Two in one" and set(document["ranks"]) == {"2"} and 0 < document["kept"] < 1
    assert document["bytes"] == (tmp_path / "small.safetensors").stat().st_size


@pytest.mark.parametrize("more, words", [
    (("--method", "switch"), "method switch is not one LoRA"),
    (("--precision", "half"), "choose from float16"),
    (("--option", "prompts=own"), "CLI: --prompt"),
    (("--lora", '{"source": "fox", "start": 0.5}'), "leave out start and end"),
])
def test_what_cannot_be_exported(exported, tmp_path, more, words):
    answer = exported("set.safetensors", *more)
    assert answer.code == 2 and words in answer.err and not (tmp_path / "set.safetensors").exists(), answer.err


def test_it_overwrites_nothing(exported, tmp_path):
    (tmp_path / "there.safetensors").write_text("mine")
    answer = exported("there.safetensors")
    assert answer.code == 2 and "is not overwritten" in answer.err and (tmp_path / "there.safetensors").read_text() == "mine"
    assert "must end in .safetensors" in exported("set.ckpt").err
    assert "which LoRAs?" in exported("set.safetensors", loras=()).err
