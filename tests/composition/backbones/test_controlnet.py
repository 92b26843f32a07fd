"""ControlNets as files: a folder and both layouts of a single file give the same model; others are refused for what they are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from composition import backbones
from composition.backbones.loading import controlnet
from composition.loras import controls
from composition.refusal import Refused
from tests import toys


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(family):
    return backbones.of((toys.sd if family == "sd" else toys.sdxl)(), family)


@pytest.fixture(scope="module")
def net(backbone):
    return toys.controlnet(backbone.pipeline)


def same(opened, net):
    mine, theirs = opened.state_dict(), net.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not opened.training and not any(weight.requires_grad for weight in opened.parameters())


def test_a_folder(backbone, net, tmp_path):
    net.save_pretrained(tmp_path / "edges")
    same(controlnet.open(tmp_path / "edges", backbone), net)


def test_a_folder_in_half_precision_alone_is_widened(backbone, net, tmp_path):
    toys.controlnet(backbone.pipeline).half().save_pretrained(tmp_path / "edges", variant="fp16")
    assert controlnet.open(tmp_path / "edges", backbone).dtype == torch.float32


def test_a_file_in_diffusers_layout(backbone, net, tmp_path):
    save_file(net.state_dict(), tmp_path / "edges.safetensors")
    same(controlnet.open(tmp_path / "edges.safetensors", backbone), net)


def test_a_file_without_attention(backbone, tmp_path):
    config = dict(toys.controlnet(backbone.pipeline).config) | {"down_block_types": ["DownBlock2D"] * len(backbone.denoiser.down_blocks),
                                                                "mid_block_type": "UNetMidBlock2D"}  # fmt: skip
    from diffusers import ControlNetModel

    net = ControlNetModel.from_config(config)
    save_file(net.state_dict(), tmp_path / "edges.safetensors")
    same(controlnet.open(tmp_path / "edges.safetensors", backbone), net)


def original(pipe, net):
    """The same weights by the names of the original code, written from the layout of the published files."""
    found = {}
    for key, weight in net.state_dict().items():
        module, _, tail = key.rpartition(".")
        kind, *rest = module.split(".")
        if kind == "controlnet_cond_embedding":
            place = {"conv_in": 0, "conv_out": 14}[rest[0]] if len(rest) == 1 else 2 * int(rest[1]) + 2
            name = f"input_hint_block.{place}"
        elif kind == "controlnet_down_blocks":
            name = f"zero_convs.{rest[0]}.0"
        else:
            name = "middle_block_out.0" if kind == "controlnet_mid_block" else toys.sgm_path(pipe, module)
        found[f"control_model.{name}.{tail}"] = weight
    return found


def test_a_file_in_the_original_layout(tmp_path, monkeypatch):
    backbone = backbones.of(toys.sd(), "sd")
    net = toys.controlnet(backbone.pipeline, channels=(8, 12, 16, 20))
    monkeypatch.setattr(backbone.pipeline, "vae_scale_factor", 8)  # what the layout has numbers for
    save_file(original(backbone.pipeline, net), tmp_path / "edges.safetensors")
    same(controlnet.open(tmp_path / "edges.safetensors", backbone), net)


def refused(path, backbone, words):
    with pytest.raises(Refused, match=words):
        controlnet.open(path, backbone)


def changed(net, folder, **settings):
    """A folder of the net whose config says something else."""
    net.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_one_for_another_base_is_refused(backbone, net, family, tmp_path):
    other = toys.controlnet((toys.sdxl if family == "sd" else toys.sd)())
    other.save_pretrained(tmp_path / "other")
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    for path in (tmp_path / "other", tmp_path / "other.safetensors"):
        refused(path, backbone, "text width 24|text width 40")
    refused(changed(net, tmp_path / "a", block_out_channels=[320, 640, 1280, 1280]), backbone, "of other sizes: it has blocks of widths")
    refused(changed(net, tmp_path / "b", cross_attention_dim=2048), backbone, r"made for SDXL \(text width 2048\)")
    refused(changed(net, tmp_path / "c", conditioning_embedding_out_channels=[16, 32, 96, 256]), backbone, "reads pictures at 8 pixels")


@pytest.mark.parametrize(("settings", "words"), [
    ({"global_pool_conditions": True}, "shuffle"), ({"conditioning_channels": 6}, "6 channels"), ({"_class_name": "ControlNetUnionModel"}, "several kinds"),
    ({"_class_name": "FluxControlNetModel"}, "for FLUX or SD 3"), ({"_class_name": "T2IAdapter"}, "T2I-Adapter"), ({"_class_name": "UNet2DConditionModel"}, "no ControlNet"),
    ({"_class_name": ["x"]}, "no ControlNet"), ({"block_out_channels": 7}, "other sizes"), ({"layers_per_block": "many"}, "other sizes")])  # fmt: skip
def test_settings_that_are_not_supported(settings, words, backbone, net, tmp_path):
    refused(changed(net, tmp_path / "net", **settings), backbone, words)


def test_broken_and_incomplete_ones(backbone, net, tmp_path):
    net.save_pretrained(tmp_path / "whole")
    weights = tmp_path / "whole/diffusion_pytorch_model.safetensors"
    some = dict(list(net.state_dict().items())[3:])
    save_file(some, weights)
    refused(tmp_path / "whole", backbone, "is incomplete: 3 of its tensors|cannot be opened")
    weights.write_bytes(b"\x80\x04")
    refused(tmp_path / "whole", backbone, "cannot be opened")
    weights.rename(weights.with_suffix(".bin"))
    refused(tmp_path / "whole", backbone, "pickle")
    (tmp_path / "whole/config.json").write_text("[" * 100)
    refused(tmp_path / "whole", backbone, "no ControlNet")
    shutil.rmtree(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    refused(tmp_path / "whole", backbone, "no ControlNet")


# What people have in place of a ControlNet, by names that such files have.
KIN = {
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": "LLLite", "lora_controlnet": "Stability",
    "adapter.body.0.resnets.0.block1.weight": "T2I-Adapter", "body.0.in_conv.weight": "T2I-Adapter", "image_proj.norm.weight": "IP-Adapter",
    "controlnet_x_embedder.weight": "FLUX", "controlnet_blocks.0.weight": "FLUX", "control_add_embedding.linear_1.weight": "several kinds",
    "base_to_ctrl.0.weight": "ControlNet-XS", "transformer_blocks.0.attn.to_q.lora_A.weight": "no ControlNet",
}


@pytest.mark.parametrize("name", KIN)
def test_its_kin_are_called_by_their_names(name, backbone, tmp_path):
    save_file({name: torch.zeros(2)}, tmp_path / "thing.safetensors")
    refused(tmp_path / "thing.safetensors", backbone, KIN[name])


def test_a_folder_that_holds_one_says_so(backbone, net, tmp_path):
    net.save_pretrained(tmp_path / "pipe/controlnet")
    refused(tmp_path / "pipe", backbone, "give controlnet in it")


def test_control_loras_are_recognised(tmp_path):
    for name, shape in (("img_in.lora_A.weight", (4, 128)), ("transformer.x_embedder.lora_A.weight", (4, 128))):
        save_file({name: torch.zeros(shape)}, tmp_path / "a.safetensors")
        assert controls.usable(tmp_path / "a.safetensors") == "control-lora"
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(4, 64)}, tmp_path / "a.safetensors")
    assert controls.usable(tmp_path / "a.safetensors") == ""
