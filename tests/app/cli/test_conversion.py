"""`medley convert`, `medley merge` and `medley inspect` of several files: what they write and say, and what they refuse."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import toys
from tests.composition.loras import kind_writers


def test_convert_to_the_other_layout_and_back(medley, toy, tmp_path):
    answer = medley("convert", "fox", "fox.safetensors", "--to", "kohya", "--model", toy.model, "--lora-dir", toy.loras)
    assert answer.code == 0, answer.err
    assert "kohya: " in answer.out and "exact: every update is the same" in answer.out
    back = medley("convert", "fox.safetensors", "back", "--to", "diffusers", "--model", toy.model, "--json").json
    assert back["exact"] and back["error"] == 0 and back["file"] == "back.safetensors" and back["layout"] == "diffusers"
    ours, theirs = load_file(tmp_path / "back.safetensors"), load_file(toy.loras / "fox.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "foxword" in medley("inspect", "back.safetensors").out


def test_fewer_ranks(medley, toy):
    document = medley("convert", "fox", "small", "--rank", 2, "--model", toy.model, "--lora-dir", toy.loras, "--json").json
    assert set(document["ranks"]) == {"2"} and 0 < document["error"] < 1 and document["worst"]["error"] >= document["error"] and not document["cut"]


def test_a_pickle_only_where_the_flag_says_so(medley, toy, tmp_path):
    tensors = load_file(toy.loras / "fox.safetensors")
    torch.save(tensors, tmp_path / "fox.pt")
    plain = medley("convert", "fox.pt", "fox.safetensors", "--to", "kohya")
    assert plain.code == 2 and "is a pickle file" in plain.err and "--unsafe-pickle" in plain.err and not (tmp_path / "fox.safetensors").exists()
    answer = medley("convert", "fox.pt", "fox.safetensors", "--unsafe-pickle")
    assert answer.code == 0 and "the tensors of fox.pt" in answer.out, answer.err
    read = load_file(tmp_path / "fox.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_merge_is_the_sum(medley, toy, tmp_path):
    answer = medley("merge", "sum.safetensors", "--lora", "fox:0.8", "--lora", "owl:0.5", "--model", toy.model, "--lora-dir", toy.loras)
    assert answer.code == 0, answer.err
    assert "rank 8" in answer.out and "--lora sum.safetensors" in answer.out
    shown = medley("inspect", "sum.safetensors")
    assert "foxword, owlword" in shown.out and "kohya" in shown.out
    small = medley("merge", "small", "--lora", "fox", "--lora", "owl", "--rank", 3, "--title", "Two", "--model", toy.model, "--lora-dir", toy.loras, "--json").json
    assert set(small["ranks"]) == {"3"} and small["title"] == "Two" and small["error"] > 0
    other = medley("merge", "ssr.safetensors", "--method", "ssr", "--lora", "fox", "--lora", "owl", "--model", toy.model, "--lora-dir", toy.loras)
    assert other.code == 0 and "SSR-Merge" in other.out, other.err


def test_inspect_of_several(medley, toy, tmp_path):
    answer = medley("inspect", "fox", "owl", "ink", "--model", toy.model, "--lora-dir", toy.loras, "--picture", "bars.png")
    assert answer.code == 0, answer.err
    for words in ("fox, character: sd, diffusers, strength", "down.0", "fox and owl: cosine", "right angles", "to begin with: --lora fox:1 --lora owl:1 --lora ink:1 --method clora-fast"):
        assert words in answer.out, answer.out
    assert Image.open(tmp_path / "bars.png").size[0] == 900
    document = medley("inspect", "fox", "owl", "--model", toy.model, "--lora-dir", toy.loras, "--json").json
    assert len(document["overlaps"]) == 1 and document["overlaps"][0]["shared"] == len(document["overlaps"][0]["by_layer"]) > 3 and document["weights"] == {"fox": 1.0, "owl": 1.0}
    alone = medley("inspect", "fox", "--model", toy.model, "--lora-dir", toy.loras, "--json").json
    assert alone["applied"] == alone["tensors"] and alone["strength"] > 0 and "mid" in alone["blocks"]


@pytest.mark.parametrize("kind, words", [("lora", "LoRA"), ("loha", "LoHa"), ("lokr", "LoKr"), ("dora", "DoRA"), ("ia3", "(IA)3"), ("oft", "OFT"), ("boft", "BOFT"), ("oftv2", "OFTv2"),
                                         ("glora", "GLoRA"), ("full", "full difference"), ("bias", "bias difference")])
def test_inspect_names_the_kind(medley, tmp_path, kind, words):
    kind_writers.write(toys.sd(dtype=torch.float64), tmp_path / "one.safetensors", kind)
    answer = medley("inspect", "one.safetensors")
    assert answer.code == 0 and f"{words} (" in answer.out and " layers)" in answer.out, answer.out


@pytest.mark.parametrize("words, arguments", [
    ("what is to change?", ("convert", "fox", "a.safetensors")),
    ("--to comfy: choose from diffusers, kohya", ("convert", "fox", "a.safetensors", "--to", "comfy")),
    ("--precision half: choose from", ("convert", "fox", "a.safetensors", "--precision", "half")),
    ("must end in .safetensors", ("convert", "fox", "a.pt", "--to", "kohya")),
    ("no LoRA is named", ("convert", "nobody", "a.safetensors", "--to", "kohya")),
    ("name that (CLI: --model)", ("convert", "fox", "a.safetensors", "--to", "kohya")),
    ("is not there", ("convert", "nothing.pt", "a.safetensors", "--unsafe-pickle")),
    ("which LoRAs?", ("merge", "a.safetensors")),
    ("leave out start, end", ("merge", "a.safetensors", "--lora", '{"source": "fox", "start": 0.5}')),
    ("--to goes with the sum alone", ("merge", "a.safetensors", "--lora", "fox", "--method", "ssr", "--to", "kohya")),
    ("must end in .png", ("inspect", "fox", "owl", "--picture", "a.jpg")),
])
def test_what_is_refused_leaves_nothing(medley, toy, tmp_path, words, arguments):
    answer = medley(*arguments, "--lora-dir", toy.loras)
    assert answer.code == 2 and words in answer.err and not (tmp_path / "a.safetensors").exists(), answer.err


def test_it_overwrites_nothing(medley, toy, tmp_path):
    (tmp_path / "there.safetensors").write_text("mine")
    for command in (("convert", "fox", "there", "--to", "kohya"), ("merge", "there", "--lora", "fox")):
        answer = medley(*command, "--lora-dir", toy.loras)
        assert answer.code == 2 and "is not overwritten" in answer.err and (tmp_path / "there.safetensors").read_text() == "mine"


def test_a_file_of_no_known_base_is_shown_by_its_own_names(medley, tmp_path):
    toys.lora(toys.sd(blocks=(16, 32)), tmp_path / "odd.safetensors", layout="kohya", text=False)
    answer = medley("inspect", "odd.safetensors")
    assert answer.code == 0 and "down.0" in answer.out, answer.err
