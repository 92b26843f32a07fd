"""The report on a set of LoRAs: inner products against dense updates, sentences and suggestions by what the numbers are."""

import math

import pytest
import torch

from composition.loras import conflicts, products
from composition.loras.kinds.lora import Factors
from composition.loras.reader import LoraFile
from composition.request import Receipt

LAYERS = {"down_blocks.0.to_q": (12, 8), "mid_block.to_k": (8, 8), "up_blocks.1.conv": (6, 4, 3, 3)}


def lora(seed, layers=LAYERS, *, rank=2, scale=1.0, alpha=None, category="", triggers=()):
    rng = torch.Generator().manual_seed(seed)
    inside = {path: Factors(torch.randn(rank, *size[1:], generator=rng, dtype=torch.float64), scale * torch.randn(size[0], rank, *(1 for _ in size[2:]), generator=rng,
                                                                                                                  dtype=torch.float64), alpha) for path, size in layers.items()}
    receipt = Receipt(name="x", path="x", sha256="", tensor_sha256="", family="sd", layout="kohya", tensors=1, applied=1, category=category, triggers=triggers)
    return LoraFile({"unet": inside}, receipt)


def dense(file):
    return {path: factors.scale * factors.stored_up.flatten(1) @ factors.stored_down.flatten(1) for path, factors in file.factors["unet"].items()}


def near(file, other, share):
    """The update of `file` plus a share of another one's."""
    inside = {path: Factors(torch.cat([factors.stored_down, other.factors["unet"][path].stored_down]),
                            torch.cat([factors.stored_up, share * other.factors["unet"][path].stored_up], dim=1)) for path, factors in file.factors["unet"].items()}
    return LoraFile({"unet": inside}, file.receipt)


def test_numbers_are_those_of_the_dense_updates():
    files = {"a": lora(1, alpha=0.5), "b": lora(2, rank=3), "c": lora(3, {"mid_block.to_k": (8, 8), "other": (5, 5)})}
    report, changes = conflicts.report(files), {name: dense(file) for name, file in files.items()}
    for strength in report.strengths:
        mine = changes[strength.name]
        assert strength.length == pytest.approx(math.sqrt(sum(float(change.square().sum()) for change in mine.values())), rel=1e-12)
        assert strength.blocks["mid"] == pytest.approx(float(mine["mid_block.to_k"].norm()), rel=1e-12)
    assert list(report.strengths[0].blocks) == ["down.0", "mid", "up.1"] and list(report.strengths[2].blocks) == ["mid", "other"]
    for overlap in report.overlaps:
        first, second = changes[overlap.first], changes[overlap.second]
        shared = first.keys() & second.keys()
        one, two = (torch.cat([change[path].flatten() for path in sorted(shared)]) for change in (first, second))
        assert overlap.shared == len(shared) and overlap.layers == len(first.keys() | second.keys())
        assert overlap.cosine == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)), abs=1e-12)
        assert overlap.ratio == pytest.approx(float(one.norm() / two.norm()), rel=1e-12)
        for path in shared:
            assert overlap.by_layer[f"unet.{path}"] == pytest.approx(float(torch.cosine_similarity(first[path].flatten(), second[path].flatten(), dim=0)), abs=1e-12)


def test_layers_of_other_shapes_do_not_touch():
    """Files read without a base may call different layers by one name."""
    gram = products.gram([products.matrices(lora(seed, {"x": size}).factors["unet"]["x"]) for seed, size in enumerate([(4, 4), (4, 6), (4, 4)])])
    assert gram[0, 1] == gram[1, 2] == 0 and gram[0, 2] != 0 and (gram.diagonal() > 0).all()


def test_distance_is_that_of_the_dense_updates():
    first, second = ((dense(file)["mid_block.to_k"], products.matrices(file.factors["unet"]["mid_block.to_k"])) for file in (lora(1), lora(2, rank=3)))
    assert products.distance(first[1], second[1]) == pytest.approx((float((first[0] - second[0]).square().sum()), float(first[0].square().sum())), rel=1e-12)
    again = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    turned = (again.mT @ first[1][0], first[1][1] @ again)
    assert products.distance(first[1], first[1])[0] == 0.0 and products.distance(first[1], turned)[0] < 1e-25


@pytest.mark.parametrize(("files", "words", "method", "weights"), [
    ({"a": lora(1), "b": lora(1)}, "nearly the same LoRA .*: use one of them", "merge", {"a": 1.0, "b": 0.0}),
    ({"a": lora(1, {"x": (4, 4)}), "b": lora(2, {"y": (4, 4)})}, "different layers", "merge", {"a": 1.0, "b": 1.0}),
    ({"a": lora(1), "b": near(lora(2), lora(1), 0.8)}, "push the same way in 3 of the 3", "merge", None),
    ({"a": lora(1), "b": near(lora(2), lora(1), -0.8)}, "push against each other in 3 of the 3", "merge", None),
    ({"a": lora(1, category="character"), "b": lora(3, category="style")}, "right angles", "np-lora", None),
    ({"a": lora(1, category="character"), "b": lora(3, category="character")}, "right angles", "clora-fast", None),
    ({"a": lora(1, scale=9.0), "b": lora(3)}, "a is 8.* times as strong as b", "merge", {"a": 0.3, "b": 1.0}),
    ({"a": lora(1, scale=0.0), "b": lora(3)}, "a changes nothing", "merge", None),
    ({"a": lora(1)}, "^$", "merge", {"a": 1.0}),
], ids=["same", "apart", "aligned", "against", "style", "two characters", "stronger", "idle", "one"])  # fmt: skip
def test_what_is_said_and_suggested(files, words, method, weights, monkeypatch):
    monkeypatch.setattr(conflicts, "ALIGNED", 0.25)  # of layers this small independent updates are not at right angles
    report = conflicts.report(files)
    import re

    assert re.search(words, report.sentence), report.sentence
    assert report.method == method and set(report.weights) == set(files) and all(0 <= weight <= 1 for weight in report.weights.values())
    assert weights is None or report.weights == pytest.approx(weights, abs=0.05)
    if "same way" in words:
        assert report.weights["a"] < 1


@pytest.mark.parametrize(("layer", "family", "name"), [
    ("unet.down_blocks.2.attentions.0.to_q", "sd", "down.2"), ("unet.mid_block.attentions.0.to_q", "sd", "mid"), ("unet.down_blocks_1_resnets", "sd", "down.1"),
    ("unet.input_blocks_4_1_proj_in", "sdxl", "input.4"), ("unet.middle_block_1", "sdxl", "mid"), ("transformer.transformer_blocks.7.attn", "flux", "double.7"),
    ("transformer.single_transformer_blocks.30.attn", "flux", "single.30"), ("transformer.transformer_blocks.3.attn", "sd3", "joint.3"),
    ("transformer.double_blocks_18_img_attn_qkv", "flux", "double.18"), ("text_encoder_2.encoder.layers.0", "sdxl", "text encoder 2"), ("unet.time_embedding.linear_1", "sd", "other"),
])  # fmt: skip
def test_blocks_are_called_as_in_requests(layer, family, name):
    assert conflicts.block(layer, family) == name
