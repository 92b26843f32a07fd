"""Condition LoRAs as files: the released layout, ours with a header, receipts in which every tensor is accounted for, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from composition import Refused
from composition.loras import condition, library
from composition.loras.condition import Settings
from composition.loras.kinds.lora import Factors
from tests.composition import conditioned


@pytest.fixture(scope="module")
def toy():
    with torch.device("meta"):
        return FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                                      joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6))


@pytest.fixture
def pairs():
    return conditioned.factors(seed=1)


def test_the_released_layout(tmp_path):
    """19 double and 38 single blocks of width 3072: 380 tensors, without a header; alpha is the rank, the name says what it is."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
    pairs = {key: (down.half(), up.half()) for key, (down, up) in conditioned.factors(3072, 1, double=19, single=38).items()}
    path = conditioned.write(tmp_path / "canny.safetensors", pairs)
    there = condition.read(path, flux)
    assert there.receipt.tensors == there.receipt.applied == 380 and there.receipt.ranks == {1: 190} and not there.receipt.ignored
    assert there.settings == Settings() and there.receipt.layout == "easycontrol" and "spatial" in there.receipt.remarks[0]
    (adapter,) = there.adapters
    assert len(adapter) == 19 * 4 + 38 * 3 and all(layer.scale == 1 and layer.stored_up.dtype == torch.float16 for layer in adapter.values())
    down, up = pairs["transformer_blocks.18.attn.processor.proj_loras.0"]
    layer = adapter["transformer_blocks.18.attn.to_out.0"]
    assert torch.equal(layer.stored_down, down) and torch.equal(layer.stored_up, up) and condition.of_output("transformer_blocks.18.attn.to_out.0")
    assert not any(condition.of_output(where) for where in adapter if "to_out" not in where)


def test_ours_says_what_it_is(tmp_path, toy, pairs):
    """Written and read back: factors, settings, words."""
    layers = {path: Factors(down, up) for path, (down, up, *_) in conditioned.by_layer(pairs).items()}
    settings = Settings("subject", 64, 2.0, "pocket-flux", "#ffeedd", "canny", 32, False, True, True)
    path = tmp_path / "deep" / "thing.safetensors"
    condition.write(path, layers, settings, {"title": "Things", "trigger_words": "SKS"}, torch.float64)
    there = condition.read(path, toy, name="the thing")
    assert replace(there.settings, bias=0.0) == replace(settings, bias=0.0) if hasattr(settings, "bias") else there.settings == settings
    assert there.settings.colour == (255, 238, 221)
    assert {where: layer.scale for where, layer in there.adapters[0].items()} == dict.fromkeys(layers, 0.5)
    assert all(torch.equal(layer.stored_up, layers[where].stored_up) for where, layer in there.adapters[0].items())
    receipt = there.receipt
    assert (receipt.name, receipt.title, receipt.triggers, receipt.applied, receipt.alphas) == ("the thing", "Things", ("SKS",), 28, {2.0: 14})
    assert receipt.line() == "the thing: applied 28/28 tensors (transformer 28), rank 4"
    described, short = condition.describe(path)
    assert described == there.settings and short.applied == 0 and sum(map(len, short.ignored.values())) == 28
    again = path.read_bytes()
    condition.write(path, layers, settings, {"title": "Things", "trigger_words": "SKS"}, torch.float64)
    assert path.read_bytes() == again


def test_what_is_missing_is_as_in_the_base(tmp_path, toy, pairs):
    some = {key: pair for key, pair in pairs.items() if not key.startswith("single")}
    some = {f"transformer.{key}": pair for key, pair in some.items()}  # as other tools write it
    there = condition.read(conditioned.write(tmp_path / "a.safetensors", some, kind="spatial"), toy)
    assert len(there.adapters[0]) == 8 and there.receipt.applied == 16 and "6 of this model's" in " ".join(there.receipt.remarks)
    some = {key: (down, up * 0) for key, (down, up) in some.items()}
    assert len(condition.read(conditioned.write(tmp_path / "b.safetensors", some), toy).receipt.no_effect) == 8


def test_proj_can_be_left_out(tmp_path, toy, pairs):
    """OmniConsistency writes it and does not use it."""
    there = condition.read(conditioned.write(tmp_path / "a.safetensors", pairs, projection="false"), toy)
    assert there.receipt.applied == 24 and {reason: len(keys) for reason, keys in there.receipt.ignored.items()} == {condition.NO_PROJECTION: 4}
    assert not any(map(condition.of_output, there.adapters[0]))


def test_a_file_of_several(tmp_path, toy, pairs):
    second = {key.replace("loras.0", "loras.1"): (down[:2], up[:, :2]) for key, (down, up) in pairs.items()}
    there = condition.read(conditioned.write(tmp_path / "a.safetensors", pairs | second), toy)
    assert [next(iter(adapter.values())).rank for adapter in there.adapters] == [4, 2] and there.receipt.applied == 56
    assert there.receipt.ranks == {4: 14, 2: 14}



@pytest.mark.parametrize("change, words", [
    (lambda t: t | {"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, "are no part of a condition LoRA"),
    (lambda t: {"transformer.x.lora_A.weight": torch.ones(1, 4), "transformer.x.lora_B.weight": torch.ones(4, 1)}, "is no condition LoRA"),
    (lambda t: {key: value for key, value in t.items() if not key.endswith("0.up.weight")}, "down alone"),
    (lambda t: t | {f"transformer.{key}": value for key, value in t.items()}, "two of"),
    (lambda t: {key.replace("_blocks.1.", "_blocks.7."): value for key, value in t.items()}, "no layer"),
    (lambda t: {key: value[:, :3] if "down" in key else value for key, value in t.items()}, "another width"),
    (lambda t: {key: value[None] for key, value in t.items()}, "another width"),
    (lambda t: {key: value[:0] if "down" in key else value[:, :0] for key, value in t.items()}, "another width"),
    (lambda t: {key: value.int() for key, value in t.items()}, "floating-point"),
    (lambda t: {key.replace("loras.0", "loras.2"): value for key, value in t.items()}, "numbered"),
    (lambda t: {key: value / 0 for key, value in t.items()}, "NaN or infinity"),
])
def test_a_file_that_is_not_understood_is_refused(change, words, tmp_path, toy, pairs):
    tensors = {f"{key}.{role}.weight": value for key, pair in pairs.items() for role, value in zip(("down", "up"), pair, strict=True)}
    save_file({key: value.contiguous().clone() for key, value in change(tensors).items()}, tmp_path / "a.safetensors")
    with pytest.raises(Refused, match=words) as refused:
        condition.read(tmp_path / "a.safetensors", toy)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("header, words", [
    ({"kind": "thing"}, "spatial or subject"), ({"size": "0"}, "whole number"), ({"size": "1e9"}, "whole number"), ({"size": "-5"}, "whole number"),
    ({"alpha": "nan"}, "at most a million"), ({"alpha": "1e300"}, "at most a million"), ({"alpha": "much"}, "a number"), ({"pad": "colourless"}, "a colour"),
    ({"offset": "99999999"}, "whole number"), ({"rounded": "perhaps"}, "true or false"), ({"version": "2"}, "newer Medley"), ({"size": "\u0663"}, "whole number"),
    ({"kind": "x" * 100_000}, "spatial or subject"),
])
def test_a_header_that_makes_no_sense_is_refused(header, words, tmp_path, toy, pairs):
    path = conditioned.write(tmp_path / "a.safetensors", pairs, **header)
    for reading in (lambda: condition.read(path, toy), lambda: condition.describe(path)):
        with pytest.raises(Refused, match=words) as refused:
            reading()
        assert len(str(refused.value)) < 500


def test_a_name_means_the_kind_that_is_asked_for(tmp_path, pairs):
    """Of a LoRA and a condition LoRA of one name each is found as what it is; a list of conditions has no others, and no broken file."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    lora, control = tmp_path / "a" / "owl.safetensors", conditioned.write(tmp_path / "b" / "owl.safetensors", pairs)
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 4)}, lora)
    (tmp_path / "broken.safetensors").write_bytes(json.dumps({}).encode())
    assert library.find("owl", "toy", [tmp_path]) == lora and library.find("owl", "toy", [tmp_path], conditions=True) == control
    assert [(path, owned) for path, _, owned in library.condition_loras("toy", [tmp_path])] == [(control, False)]
    with pytest.raises(Refused, match="no condition LoRA is named 'canyn'"):
        library.find("canyn", "toy", [tmp_path], conditions=True)
