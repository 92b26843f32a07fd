"""The map of names, on models of true size without weights, against diffusers' own converter as a second opinion."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from composition.loras import layers as layer_map
from tests import toys

SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
UNETS = {"sd": {"cross_attention_dim": 768, "attention_head_dim": 8}, "sdxl": SDXL}


@pytest.fixture(scope="module", params=UNETS)
def unet(request):
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[request.param])


def _by_diffusers(names: list[str], config=None) -> dict[str, str]:
    """kohya name to module path as diffusers converts it: each name carries its number, to find it again."""
    state = {}
    for index, name in enumerate(names):
        state |= {f"{name}.lora_down.weight": torch.tensor(index), f"{name}.lora_up.weight": torch.tensor(index)}
    if config is not None:
        state = _maybe_map_sgm_blocks_to_diffusers(state, config)
    made, _ = _convert_non_diffusers_lora_to_diffusers(state)
    turn = convert_unet_state_dict_to_peft if names[0].startswith("lora_unet") else convert_state_dict_to_peft
    found = {}
    for key, value in turn(made).items():
        if ".lora_A" in key:
            found[names[int(value)]] = key.split(".lora_A")[0].split(".", 1)[1]
    return found


def test_every_layer_has_its_path_as_name(unet):
    paths = [path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    names = layer_map.names("unet", unet)
    assert {names[path.replace(".", "_")] for path in paths} == set(paths) == set(names.values())


def test_original_names_as_diffusers_converts_them(unet):
    """Every layer has a name in the original code, and diffusers means the same layer by it, but for two faults of its.

    Its converter was made for SDXL's nine blocks: given SD's twelve together it takes input_blocks_10 for a part of
    input_blocks_1 (so they are asked one by one), and the upsampler of a level without attention for an attention.
    """
    spelled = {path.replace(".", "_") for path in layer_map.layers(unet)}
    original = {name: path for name, path in layer_map.names("unet", unet).items() if name not in spelled}
    assert sorted(original.values()) == sorted(layer_map.layers(unet))
    theirs = {}
    for name in original:
        theirs |= _by_diffusers([f"lora_unet_{name}"], unet.config)
    theirs = {name.removeprefix("lora_unet_"): path for name, path in theirs.items()}
    wrong = {name for name, path in theirs.items() if path not in original.values()}
    assert wrong <= {"output_blocks_2_1_conv"}
    assert {**theirs, **{name: "up_blocks.0.upsamplers.0.conv" for name in wrong}} == original


def test_kohya_names_as_diffusers_converts_them(unet):
    """The names kohya gives a diffusers UNet; diffusers' converter does not know the four embedding layers of SDXL."""
    names = {path.replace(".", "_"): path for path in layer_map.layers(unet) if not path.startswith("add_embedding")}
    theirs = _by_diffusers([f"lora_unet_{name}" for name in names])
    assert {name.removeprefix("lora_unet_"): path for name, path in theirs.items()} == names


def test_known_names_by_hand():
    """Names seen in files of SDXL and of SD 1.5, checked against the models by hand."""
    with torch.device("meta"):
        names = layer_map.names("unet", UNet2DConditionModel(**SDXL))
    last = "down_blocks.2.attentions.1"
    hand = {
        "input_blocks_0_0": "conv_in",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "input_blocks_8_1_transformer_blocks_9_norm1": None,
        "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0": f"{last}.transformer_blocks.9.attn2.to_out.0",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
        "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "label_emb_0_2": "add_embedding.linear_2",
        "out_2": "conv_out",
    }
    assert {name: names.get(name) for name in hand} == hand


@pytest.mark.parametrize("make", [toys.sd, toys.sdxl])
def test_small_models(make):
    """Any depth: the toys' names follow their own structure."""
    pipe = make()
    names = layer_map.names("unet", pipe.unet)
    for path in layer_map.layers(pipe.unet):
        assert names[toys.sgm_path(pipe, path).replace(".", "_")] == path


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoders(kind):
    with torch.device("meta"):
        text = kind(CLIPTextConfig(num_hidden_layers=2))
    names, paths = layer_map.names("text_encoder", text), layer_map.layers(text)
    for path in paths:
        short = path.removeprefix("text_model.").replace(".", "_")
        assert names[short] == names[f"text_model_{short}"] == path
    assert set(names.values()) == set(paths)
    theirs = _by_diffusers([f"lora_te_{name}" for name in names if name.startswith("text_model_encoder")])
    for name, path in theirs.items():
        assert path.removeprefix("text_model.") == names[name.removeprefix("lora_te_")].removeprefix("text_model.")


def test_numbers_only_for_a_count_that_fits(unet):
    blocks = sum(path.endswith("attn1.to_q") for path in layer_map.layers(unet))
    assert len(set(layer_map.numbered("unet", unet, 9 * blocks).values())) == 9 * blocks
    assert len(set(layer_map.numbered("unet", unet, 8 * blocks).values())) == 8 * blocks
    assert layer_map.numbered("unet", unet, 9 * blocks - 1) == {}
    assert layer_map.numbered("unet", nn.Linear(2, 2), 9) == {}


def test_other_models_get_their_paths_only():
    """A denoiser of another kind, a middle without attention, a grouped convolution: no invented names."""
    odd = nn.ModuleDict({"transformer_blocks": nn.ModuleList([nn.Linear(2, 2)]), "conv": nn.Conv2d(4, 4, 1, groups=2)})
    assert layer_map.names("unet", odd) == {"transformer_blocks_0": "transformer_blocks.0"}
    unet = UNet2DConditionModel(block_out_channels=(8,), layers_per_block=2, norm_num_groups=4, attention_head_dim=4,
                                down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                                mid_block_type=None)  # fmt: skip
    names = layer_map.names("unet", unet)
    assert names["output_blocks_2_0_in_layers_2"] == "up_blocks.0.resnets.2.conv1"
    assert not any(name.startswith("middle") for name in names)
