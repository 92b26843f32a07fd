"""Bases without weights: the layers of the real models and of folders, nothing in memory, and folders that are none."""

import json

import pytest
import torch

from composition import Refused, bundled
from composition.backbones.loading import skeleton
from composition.bundled import BUNDLES
from composition.loras import layers as layer_map
from tests import toys


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd3"])
def test_a_folder_has_the_layers_of_its_pipeline(family, tmp_path):
    pipe = getattr(toys, family)()
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    components = skeleton.of_folder(tmp_path)
    expected = {name: part for name, part in pipe.components.items() if name in ("unet", "transformer") or name.startswith("text_encoder")}
    assert components.keys() == expected.keys()
    for name, part in components.items():
        shapes, own = ({path: layer_map.shape(layer) for path, layer in layer_map.layers(module).items()} for module in (part, expected[name]))
        assert shapes == own and {weight.device.type for weight in part.parameters()} == {"meta"}


@pytest.mark.parametrize("family, layers, width", [("sd", 282, 768), ("sd2", 282, 1024), ("sdxl", 794, 2048)])
def test_public_models_have_their_layers(family, layers, width):
    unet = layer_map.layers(skeleton.of_family(family)["unet"])
    assert len(unet) == layers and layer_map.shape(unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"])[1] == width


def test_flux_has_19_double_and_38_single_blocks():
    """3,035,136 outputs in the original's 304 linears of blocks (AutoLoRA, arXiv 2508.02107)."""
    blocks = {path: layer for path, layer in layer_map.layers(skeleton.of_family("flux")["transformer"]).items() if "transformer_blocks." in path}
    assert sum(layer.weight.shape[0] for layer in blocks.values()) == 3_035_136
    assert "single_transformer_blocks.37.proj_out" in blocks and "transformer_blocks.18.attn.to_q" in blocks


@pytest.mark.parametrize("model", BUNDLES)
def test_bundled_models_have_theirs(model):
    components = skeleton.of_folder(bundled.path(BUNDLES[model].model))
    assert {"text_encoder", "unet" if model == "pocket" else "transformer"} <= components.keys()


def test_a_family_without_one_public_model_is_refused():
    for family in ("sd3", "unknown"):
        with pytest.raises(Refused, match="name the model"):
            skeleton.of_family(family)


BROKEN = {
    "no folder": None, "no json": "x", "a list": "[]", "another class": json.dumps({"unet": ["diffusers", "StableDiffusionPipeline"]}),
    "code": json.dumps({"unet": ["os", "system"]}), "no pair": json.dumps({"unet": "UNet2DConditionModel"}),
    "no config": json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_folder_of_a_model_is_refused(case, tmp_path):
    if (text := BROKEN[case]) is not None:
        (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(Refused, match="diffusers folder"):
        skeleton.of_folder(tmp_path if text is not None else tmp_path / "none")


def test_a_config_that_does_not_fit_its_class_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    (tmp_path / "unet/config.json").write_text(json.dumps({"block_out_channels": [32, 33], "norm_num_groups": 7}))
    with pytest.raises(Refused, match="diffusers folder"):
        skeleton.of_folder(tmp_path)
    assert torch.empty(0).device.type == "cpu"
