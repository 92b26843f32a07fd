"""FLUX and SD3 files in the layouts people write: on models of true size against diffusers' converters, on toys against dense updates."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import lora_conversion_utils as stock
from diffusers.loaders import single_file_utils as checkpoints
from safetensors.torch import save_file
from torch import nn

from composition.loras import layers as layer_map
from composition.loras import reader
from composition.refusal import Refused
from tests import toys

SIZES = {"img_attn.qkv": (9216, 3072), "img_attn.proj": (3072, 3072), "txt_attn.qkv": (9216, 3072), "txt_attn.proj": (3072, 3072),
         "img_mlp.0": (12288, 3072), "img_mlp.2": (3072, 12288), "txt_mlp.0": (12288, 3072), "txt_mlp.2": (3072, 12288),
         "img_mod.lin": (18432, 3072), "txt_mod.lin": (18432, 3072)}  # fmt: skip
SINGLES = {"linear1": (21504, 3072), "linear2": (3072, 15360), "modulation.lin": (9216, 3072)}


@pytest.fixture(scope="module")
def flux():
    """FLUX.1-dev, 19 + 38 blocks of width 3072, without weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def original(double=19, single=38):
    """Layer of the authors' code to (out, in), for every layer inside the blocks."""
    found = {f"double_blocks.{i}.{name}": size for i in range(double) for name, size in SIZES.items()}
    return found | {f"single_blocks.{i}.{name}": size for i in range(single) for name, size in SINGLES.items()}


def rank_one(sizes, spell, alpha=None):
    """Random rank-1 tensors for these layers, by spelled keys."""
    rng, tensors = torch.Generator().manual_seed(0), {}
    for name, (out, into) in sizes.items():
        down, up, scale = spell(name)
        tensors |= {down: torch.randn(1, into, generator=rng), up: torch.randn(out, 1, generator=rng)}
        if alpha is not None:
            tensors[scale] = torch.tensor(alpha)
    return tensors


def read(tmp_path, tensors, components, family, **more):
    path = tmp_path / "a.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return reader.read(path, components, family, **more)


def same(ours, theirs):
    """Our factors by path and theirs by peft key are the same rank-1 updates: one column and one row of the product tell."""
    paths = {key.removeprefix("transformer.").split(".lora_")[0] for key in theirs}
    assert set(ours) == paths
    for path in paths:
        down, up = (theirs[f"transformer.{path}.lora_{x}.weight"] for x in "AB")
        assert ours[path].up.shape == up.shape and ours[path].down.shape == down.shape, path
        for mine, other in ((ours[path].up @ ours[path].down[:, :1], up @ down[:, :1]), (ours[path].up[:1] @ ours[path].down, up[:1] @ down)):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_kohya_of_true_size_as_diffusers_converts_it(flux, tmp_path):
    def spell(name):
        head = f"lora_unet_{name.replace('.', '_')}"
        return f"{head}.lora_down.weight", f"{head}.lora_up.weight", f"{head}.alpha"

    tensors = rank_one(original(), spell, alpha=0.5)
    found = read(tmp_path, tensors, {"transformer": flux}, "flux")
    assert (found.receipt.family, found.receipt.layout, found.receipt.applied) == ("flux", "kohya", len(tensors))
    same(found.factors["transformer"], stock._convert_kohya_flux_lora_to_diffusers(dict(tensors)))


def test_xlabs_of_true_size_as_diffusers_converts_it(flux, tmp_path):
    names = {f"double_blocks.{i}.processor.{part}_lora{side}": size for i in range(19) for side in (1, 2)
             for part, size in (("qkv", (9216, 3072)), ("proj", (3072, 3072)))}
    names |= {f"single_blocks.{i}.processor.{part}_lora": size for i in range(38)
              for part, size in (("qkv", (9216, 3072)), ("proj", (3072, 15360)))}
    tensors = rank_one(names, lambda name: (f"{name}.down.weight", f"{name}.up.weight", ""))
    found = read(tmp_path, tensors, {"transformer": flux}, "flux")
    assert (found.receipt.layout, found.receipt.applied) == ("xlabs", len(tensors))
    same(found.factors["transformer"], stock._convert_xlabs_flux_lora_to_diffusers(dict(tensors)))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "base_model.model."])
def test_bfl_names_are_the_kohya_ones_with_dots(prefix, flux, tmp_path):
    def dotted(name):
        return f"{prefix}{name}.lora_A.weight", f"{prefix}{name}.lora_B.weight", ""

    def kohya(name):
        head = f"lora_unet_{name.replace('.', '_')}"
        return f"{head}.lora_down.weight", f"{head}.lora_up.weight", ""

    some = original(1, 1)
    theirs = read(tmp_path, rank_one(some, kohya), {"transformer": flux}, "flux").factors["transformer"]
    found = read(tmp_path, rank_one(some, dotted), {"transformer": flux}, "flux")
    assert found.receipt.layout in ("bfl", "comfyui") and set(found.factors["transformer"]) == set(theirs)
    for path, one in found.factors["transformer"].items():
        assert torch.equal(one.up, theirs[path].up) and torch.equal(one.down, theirs[path].down)


@pytest.mark.parametrize("layout", ["ai-toolkit", "onetrainer", "kohya-of-diffusers"])
@pytest.mark.parametrize("make", [toys.flux, toys.sd3])
def test_diffusers_names_in_every_spelling(make, layout, tmp_path):
    """ai-toolkit writes diffusers' keys, OneTrainer the paths with underscores; both text encoders with them."""
    pipe = make()
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    if hasattr(pipe, "text_encoder_3"):
        parts["text_encoder_3"] = pipe.text_encoder_3
    heads = {"onetrainer": {"transformer": "lora_transformer_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_",
                            "text_encoder_3": "lora_te3_"}}
    heads["kohya-of-diffusers"] = heads["onetrainer"] | {"transformer": "lora_unet_"}
    tensors, truth = {}, {}
    for part, model in parts.items():
        for index, (path, layer) in enumerate((p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)):
            rng = torch.Generator().manual_seed(index)
            down = torch.randn(2, *layer.weight.shape[1:], generator=rng)
            up = torch.randn(layer.weight.shape[0], 2, *[1] * (layer.weight.ndim - 2), generator=rng)
            truth[part, path] = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)) * 0.5
            if layout == "ai-toolkit":
                head = f"{part}.{path}"
                tensors |= {f"{head}.lora_A.weight": down, f"{head}.lora_B.weight": up, f"{head}.alpha": torch.tensor(1.0)}
            else:
                head = heads[layout][part] + path.replace(".", "_")
                tensors |= {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up, f"{head}.alpha": torch.tensor(1.0)}
    found = read(tmp_path, tensors, parts, "flux" if make is toys.flux else "sd3")
    assert found.receipt.applied == found.receipt.tensors == len(tensors)
    assert {(part, path) for part, inside in found.factors.items() for path in inside} == set(truth)
    for (part, path), dense in truth.items():
        one = found.factors[part][path]
        torch.testing.assert_close(one.up.flatten(1) @ one.down.flatten(1), dense)


def test_fused_layers_of_flux_against_the_dense_update(tmp_path):
    """One update of the authors' layer is the updates of diffusers' layers one below the other; the last modulation is turned."""
    pipe = toys.flux(dtype=torch.float64)
    width = pipe.transformer.inner_dim
    stacked = {
        "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "single_blocks.1.linear1": [*(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.1.proj_mlp"],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
        "final_layer.linear": ["proj_out"], "img_in": ["x_embedder"], "txt_in": ["context_embedder"],
        "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    }
    tensors, dense = {}, {}
    for index, (name, paths) in enumerate(stacked.items()):
        rng = torch.Generator().manual_seed(index)
        layers = [pipe.transformer.get_submodule(path) for path in paths]
        down = torch.randn(2, layers[0].in_features, generator=rng, dtype=torch.float64)
        up = torch.randn(sum(layer.out_features for layer in layers), 2, generator=rng, dtype=torch.float64)
        head = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up, f"{head}.alpha": torch.tensor(3.0)}
        whole = 1.5 * up @ down
        if name == "final_layer.adaLN_modulation.1":  # theirs: shift, scale; diffusers': scale, shift
            whole = torch.cat([whole[width:], whole[:width]])
        at = 0
        for path, layer in zip(paths, layers, strict=True):
            dense[path] = whole[at : at + layer.out_features]
            at += layer.out_features
    found = read(tmp_path, tensors, {"transformer": pipe.transformer}, "flux")
    assert found.receipt.applied == len(tensors) and found.receipt.components["transformer"]["modules"] == len(dense)
    assert set(found.factors["transformer"]) == set(dense)
    for path, update in dense.items():
        one = found.factors["transformer"][path]
        assert (one.up @ one.down - update).abs().max() < 1e-10 * update.abs().max(), path


def test_fused_layers_of_sd3_against_the_dense_update(tmp_path):
    pipe = toys.sd3(dtype=torch.float64)
    last = len(pipe.transformer.transformer_blocks) - 1
    width = pipe.transformer.inner_dim
    stacked = {
        "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "joint_blocks.0.x_block.attn2.qkv": [f"transformer_blocks.0.attn2.to_{x}" for x in "qkv"],
        "joint_blocks.1.context_block.attn.qkv": [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
        "joint_blocks.1.context_block.mlp.fc2": ["transformer_blocks.1.ff_context.net.2"],
        "joint_blocks.1.x_block.adaLN_modulation.1": ["transformer_blocks.1.norm1.linear"],
        "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
        f"joint_blocks.{last}.context_block.adaLN_modulation.1": [f"transformer_blocks.{last}.norm1_context.linear"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    }
    tensors, dense = {}, {}
    for index, (name, paths) in enumerate(stacked.items()):
        rng = torch.Generator().manual_seed(index)
        layers = [pipe.transformer.get_submodule(path) for path in paths]
        down = torch.randn(2, layers[0].in_features, generator=rng, dtype=torch.float64)
        up = torch.randn(sum(layer.out_features for layer in layers), 2, generator=rng, dtype=torch.float64)
        head = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up, f"{head}.alpha": torch.tensor(2.0)}
        whole = up @ down
        if paths[0].endswith(("norm_out.linear", f"{last}.norm1_context.linear")):
            whole = torch.cat([whole[width:], whole[:width]])
        at = 0
        for path, layer in zip(paths, layers, strict=True):
            dense[path] = whole[at : at + layer.out_features]
            at += layer.out_features
    found = read(tmp_path, tensors, {"transformer": pipe.transformer}, "sd3")
    assert found.receipt.family == "sd3" and set(found.factors["transformer"]) == set(dense)
    for path, update in dense.items():
        one = found.factors["transformer"][path]
        assert (one.up @ one.down - update).abs().max() < 1e-10 * update.abs().max(), path


@pytest.mark.parametrize("dual", [0, 13], ids=["sd3-medium", "sd3.5-medium"])
def test_kohya_of_sd3s_true_size_as_diffusers_splits_a_checkpoint(dual, tmp_path):
    """24 blocks of width 1536. diffusers reads the authors' checkpoints, not their LoRAs: it is given the up factors for weights."""
    width, last = 1536, 23
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=width, joint_attention_dim=4096,
            pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192, dual_attention_layers=tuple(range(dual)))
    sizes = {}
    for i in range(24):
        for side in ("x_block", "context_block"):
            ends = i == last and side == "context_block"  # its text goes no further
            parts = 2 if ends else 9 if side == "x_block" and i < dual else 6
            inner = {"attn.qkv": (3 * width, width), "adaLN_modulation.1": (parts * width, width)}
            if not ends:
                inner |= {"attn.proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
            if parts == 9:
                inner |= {"attn2.qkv": (3 * width, width), "attn2.proj": (width, width)}
            sizes |= {f"joint_blocks.{i}.{side}.{name}": size for name, size in inner.items()}

    def head(name):
        return f"lora_unet_{name.replace('.', '_')}"

    tensors = rank_one(sizes, lambda name: (f"{head(name)}.lora_down.weight", f"{head(name)}.lora_up.weight", f"{head(name)}.alpha"), alpha=0.5)
    found = read(tmp_path, tensors, {"transformer": model}, "sd3")
    assert (found.receipt.family, found.receipt.layout, found.receipt.applied) == ("sd3", "kohya", len(tensors))

    outer = ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder",
             "final_layer.linear", "final_layer.adaLN_modulation.1")
    nothing = {f"{name}.{part}": torch.zeros(2 * width, 1) for name in outer for part in ("weight", "bias")} | {"pos_embed": torch.zeros(1)}
    for side, scale in (("up", 0.5), ("down", 1.0)):
        columns = {name: tensors[f"{head(name)}.lora_{side}.weight"] * scale for name in sizes}
        # a down factor is the whole of each of a fused layer's parts, and of the two halves that change places in the last block's text
        columns = {name: one if side == "up" else one.T.repeat(3 if name.endswith("qkv") else 2, 1) for name, one in columns.items()}
        checkpoint = {f"{name}.{part}": one for name, one in columns.items() for part in ("weight", "bias")}
        expected = checkpoints.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint | dict(nothing))
        paths = {key.removesuffix(".weight") for key in expected if key.startswith("transformer_blocks") and key.endswith(".weight")}
        assert set(found.factors["transformer"]) == paths
        for path in paths:
            mine = getattr(found.factors["transformer"][path], side)
            wanted = expected[f"{path}.weight"]
            torch.testing.assert_close(mine if side == "up" else mine.T, wanted if side == "up" else wanted[: mine.shape[1]], rtol=1e-6, atol=0)


def test_every_layer_of_both_has_a_name_of_its_authors():
    """Names cover every linear layer and convolution, each once, but for XLabs' shorter name of the same rows."""
    with torch.device("meta"):
        models = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True), SD3Transformer2DModel(
            num_layers=3, dual_attention_layers=(0,))
    for model in models:
        layers = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
        named = {part.path for name, parts in layer_map.fused.names(model).items() for part in parts}
        assert named == layers


@pytest.mark.parametrize(("key", "reason"), [
    ("lora_unet_double_blocks_0_img_attn_proj.oft_diag", "OFT"), ("lora_unet_double_blocks_0_img_attn_proj.set_weight", "whole weights"),
    ("double_blocks.0.img_attn.norm.query_norm.scale", "not a LoRA tensor"), ("lora_te3_encoder_block_9_layer_0_SelfAttention_q.alpha", "")])
def test_what_is_not_applied_is_named(key, reason, tmp_path):
    pipe = toys.flux()
    head = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{head}.lora_down.weight": torch.ones(1, 32), f"{head}.lora_up.weight": torch.ones(32, 1), key: torch.ones(1)}
    tensors |= {"lora_unet_double_blocks_0_img_mlp_2.lora_down.weight": torch.ones(1, 128),
                "lora_unet_double_blocks_0_img_mlp_2.lora_up.weight": torch.ones(32, 1)}
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    with pytest.raises(Refused, match="allow_partial"):
        read(tmp_path, tensors, parts, "flux")
    receipt = read(tmp_path, tensors, parts, "flux", allow_partial=True).receipt
    assert key in {one for keys in receipt.ignored.values() for one in keys}
    assert any(reason in said for said in receipt.ignored)


def test_t5_keys_are_applied(tmp_path):
    """diffusers drops them: files call T5 the second or the third text encoder, FLUX has it as its second."""
    pipe = toys.flux()
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    for head in ("lora_te3_", "lora_te2_"):
        name = f"{head}encoder_block_1_layer_0_SelfAttention_q"
        tensors = {f"{name}.lora_down.weight": torch.ones(2, 24), f"{name}.lora_up.weight": torch.ones(24, 2), f"{name}.alpha": torch.tensor(2.0)}
        name = "lora_unet_double_blocks_0_img_attn_proj"
        tensors |= {f"{name}.lora_down.weight": torch.ones(1, 32), f"{name}.lora_up.weight": torch.ones(32, 1)}
        found = read(tmp_path, tensors, parts, "flux")
        assert set(found.factors["text_encoder_2"]) == {"encoder.block.1.layer.0.SelfAttention.q"}


@pytest.mark.parametrize(("made", "base", "said"), [
    ("flux", "sd3", "made for FLUX; this base is SD3"), ("sd", "flux", "this base is FLUX"), ("flux", "sd", "made for FLUX"),
    ("sdxl", "sd3", "this base is SD3")])
def test_a_file_of_another_family_is_told(made, base, said, tmp_path):
    makers = {"flux": toys.flux, "sd3": toys.sd3, "sd": toys.sd, "sdxl": toys.sdxl}
    path = toys.lora(makers[made](), tmp_path / "a.safetensors")
    pipe = makers[base]()
    names = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    parts = {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}
    for partial in (False, True):
        with pytest.raises(Refused, match=said):
            reader.read(path, parts, base, allow_partial=partial)
