"""The spellings of trainers and tools, on every family: each file's factors are the dense update it was written from, in float64.

The names are built here from diffusers' paths by each tool's rules, and not by the reader's map. Where stock diffusers reads a layout on a
toy, it is a second witness.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from composition.loras import reader, scale
from composition.refusal import Refused
from tests import toys

RANK = 2
FAMILIES = {"sd": toys.sd, "sdxl": toys.sdxl, "sd3": toys.sd3, "flux": toys.flux}
NAMES = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def pipes():
    return {family: make(dtype=torch.float64) for family, make in FAMILIES.items()}


def components(pipe):
    return {name: getattr(pipe, name) for name in NAMES if getattr(pipe, name, None) is not None}


# names of the original code, by hand: qkv and linear1 part by part ------------------------------------------------------

DOUBLE = {"attn.to_q": "img_attn.qkv.0", "attn.to_k": "img_attn.qkv.1", "attn.to_v": "img_attn.qkv.2", "attn.to_out.0": "img_attn.proj",
          "attn.add_q_proj": "txt_attn.qkv.0", "attn.add_k_proj": "txt_attn.qkv.1", "attn.add_v_proj": "txt_attn.qkv.2",
          "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0",
          "ff_context.net.2": "txt_mlp.2", "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}
SINGLE = {"attn.to_q": "linear1.0", "attn.to_k": "linear1.1", "attn.to_v": "linear1.2", "proj_mlp": "linear1.3", "proj_out": "linear2",
          "norm.linear": "modulation.lin"}
JOINT = {"attn.to_q": "x_block.attn.qkv.0", "attn.to_k": "x_block.attn.qkv.1", "attn.to_v": "x_block.attn.qkv.2", "attn.to_out.0": "x_block.attn.proj",
         "attn2.to_q": "x_block.attn2.qkv.0", "attn2.to_k": "x_block.attn2.qkv.1", "attn2.to_v": "x_block.attn2.qkv.2",
         "attn2.to_out.0": "x_block.attn2.proj", "attn.add_q_proj": "context_block.attn.qkv.0", "attn.add_k_proj": "context_block.attn.qkv.1",
         "attn.add_v_proj": "context_block.attn.qkv.2", "attn.to_add_out": "context_block.attn.proj", "ff.net.0.proj": "x_block.mlp.fc1",
         "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
         "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1"}
OUTER = {"time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", "t_embedder.mlp.0"),
         "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", "t_embedder.mlp.2"),
         "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", "y_embedder.mlp.0"),
         "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", "y_embedder.mlp.2"), "x_embedder": ("img_in.proj", ""),
         "context_embedder": ("txt_in", "context_embedder"), "proj_out": ("final_layer.linear", "final_layer.linear"),
         "pos_embed.proj": ("", "x_embedder.proj")}


def original(pipe, component, path):
    """The name in the original code of one layer of the denoiser; "" for one whose halves change places there, which others test."""
    if component == "unet":
        return toys.sgm_path(pipe, path)
    flux = hasattr(pipe.transformer, "single_transformer_blocks")
    last = f"transformer_blocks.{len(pipe.transformer.transformer_blocks) - 1}.norm1_context.linear"
    if path == "norm_out.linear" or not flux and path == last:
        return ""
    if path in OUTER:
        return OUTER[path][0 if flux else 1]
    kind, index, inner = path.split(".", 2)
    if kind == "single_transformer_blocks":
        return f"single_blocks.{index}.{SINGLE[inner]}"
    return f"double_blocks.{index}.{DOUBLE[inner]}" if flux else f"joint_blocks.{index}.{JOINT[inner]}"


def text(path):
    """The path of a layer of CLIP as files have it."""
    return path if path.startswith(("text_model.", "text_projection", "encoder.block")) else f"text_model.{path}"


def flat(path):
    return path.replace(".", "_")


# one function a layout: (pipe, component, path) -> the name before the role, "" for a layer that such files do not have -----------------


def lycoris(pipe, component, path):
    """LyCORIS as a wrapper of one module, as SimpleTuner and ai-toolkit use it: the module's own paths, nothing of the component."""
    return "" if component.startswith("text") else f"lycoris_{flat(path)}"


def checkpoint(pipe, component, path):
    """Names as in a whole checkpoint of ComfyUI's."""
    heads = {"text_encoder": "clip_l.transformer.", "text_encoder_2": "clip_g.transformer.", "text_encoder_3": "t5xxl.transformer."}
    if component in heads:
        component = "text_encoder_3" if component == "text_encoder_2" and path.startswith("encoder.block") else component
        return heads[component] + text(path)
    name = original(pipe, component, path) if component == "unet" else path
    return f"model.diffusion_model.{name}"


def comfyui(pipe, component, path):
    name = checkpoint(pipe, component, path)
    return name.replace("model.diffusion_model.", "diffusion_model.") if name.startswith("model.") else f"text_encoders.{name}"


def omi(pipe, component, path):
    """OneTrainer's interchange names."""
    heads = {"text_encoder": "clip_l.", "text_encoder_2": "clip_g.", "text_encoder_3": "t5."}
    if component in heads:
        component = "text_encoder_3" if component == "text_encoder_2" and path.startswith("encoder.block") else component
        return heads[component] + text(path)
    name = original(pipe, component, path)
    return f"{component}.{name}" if name else ""


def onetrainer_flat(pipe, component, path):
    """The same with underscores."""
    heads = {"unet": "lora_unet_", "transformer": "lora_transformer_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_",
             "text_encoder_3": "lora_te3_"}
    name = text(path) if component.startswith("text") else original(pipe, component, path)
    return heads[component] + flat(name) if name else ""


def compiled(pipe, component, path):
    return f"{component}._orig_mod.{text(path) if component.startswith('text') else path}"


def compiled_flat(pipe, component, path):
    return "" if component.startswith("text") else f"lora_unet__orig_mod_{flat(path)}"


def spread(pipe, component, path):
    """Of a model that was trained on several devices."""
    return "" if component.startswith("text") else f"base_model.model.module.{path}"


def peft_folder(pipe, component, path):
    """PEFT's adapter_model.safetensors of one model: CLIP and T5 are known by their own names."""
    if component == "text_encoder_2" and not path.startswith("encoder.block") or path == "text_projection":
        return ""  # nothing tells one CLIP from another
    return f"base_model.model.{text(path)}" if component.startswith("text") else f"base_model.model.{path}"


def bare_original(pipe, component, path):
    name = "" if component.startswith("text") else original(pipe, component, path)
    return "" if name in ("out.2",) else name


LAYOUTS = {
    "lycoris": (lycoris, "lora_{}.weight", "lycoris"),
    "checkpoint": (checkpoint, "lora_{}.weight", "comfyui|bfl"),
    "comfyui": (comfyui, "lora_{}.weight", "comfyui|bfl"),
    "omi": (omi, "lora_{}.weight", "omi|diffusers"),
    "onetrainer-original": (onetrainer_flat, "lora_{}.weight", "onetrainer|kohya|kohya-sgm"),
    "compiled": (compiled, "lora_{AB}.weight", "diffusers"),
    "compiled-kohya": (compiled_flat, "lora_{}.weight", "kohya"),
    "spread": (spread, "lora_{AB}.default.weight", "diffusers|bfl"),
    "peft-folder": (peft_folder, "lora_{AB}.weight", "diffusers|bfl"),
    "bare-original": (bare_original, "lora_{AB}.weight", "diffusers|bfl"),
    "without-weight": (compiled, "lora_{AB}", "diffusers"),
}


def write(pipe, path, spelled, role, *, alpha: float | None = 1.0, text_alpha=True, dtype=torch.float64):
    """(file, dense update by component and path) of every layer that the layout spells; no two updates are alike."""
    tensors, truth = {}, {}
    down_role, up_role = role.replace("{AB}", "A").replace("{}", "down"), role.replace("{AB}", "B").replace("{}", "up")
    for component, model in components(pipe).items():
        for index, (where, layer) in enumerate((p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)):
            head = spelled(pipe, component, where)
            if not head:
                continue
            rng = torch.Generator().manual_seed(1000 * len(truth) + index)
            down = torch.randn(RANK, *layer.weight.shape[1:], generator=rng, dtype=torch.float64).to(dtype)
            up = torch.randn(layer.weight.shape[0], RANK, *[1] * (layer.weight.ndim - 2), generator=rng, dtype=torch.float64).to(dtype)
            assert f"{head}.{down_role}" not in tensors, head
            tensors |= {f"{head}.{down_role}": down, f"{head}.{up_role}": up}
            if alpha is not None and text_alpha:
                tensors[f"{head}.alpha"] = torch.tensor(alpha)
            factor = 1.0 if alpha is None else alpha / RANK
            truth[component, where] = factor * torch.einsum("or,r...->o...", up.double().flatten(1), down.double())
    save_file(tensors, path)
    return path, truth


def check(found, truth):
    assert {(part, path) for part, inside in found.factors.items() for path in inside} == set(truth)
    for (part, path), dense in truth.items():
        one = found.factors[part][path]
        update = (one.up.flatten(1) @ one.down.flatten(1)).reshape(dense.shape)
        assert (update - dense).abs().max() <= 1e-10 * dense.abs().max(), (part, path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts(family, layout, pipes, tmp_path):
    spelled, role, said = LAYOUTS[layout]
    path, truth = write(pipes[family], tmp_path / "a.safetensors", spelled, role)
    found = reader.read(path, components(pipes[family]), family)
    check(found, truth)
    assert len(truth) > 20 and found.receipt.applied == found.receipt.tensors == 3 * len(truth) and not found.receipt.ignored
    assert set(found.receipt.layout.split(" + ")) <= set(said.split("|"))


@pytest.mark.parametrize("alpha", [1.0, None], ids=["with its alpha", "told by the header"])
def test_alpha_one_of_musubi(alpha, pipes, tmp_path):
    """musubi-tuner's alpha is 1 unless it is told otherwise: its files are as strong as 1 / rank says, wherever that stands."""
    pipe = pipes["flux"]
    path, truth = write(pipe, tmp_path / "a.safetensors", lambda pipe, component, path: "" if component.startswith("text") else
                        f"lora_unet_{flat(path)}", "lora_{}.weight", text_alpha=alpha is not None)
    if alpha is None:
        save_file(load_file(path), path, metadata={"ss_network_module": "networks.lora_flux", "ss_network_alpha": "1.0", "ss_network_dim": str(RANK)})
    found = reader.read(path, components(pipe), "flux")
    check(found, truth)
    assert found.receipt.alphas == {1.0: len(truth)}
    assert found.receipt.alpha_from == ({scale.TENSORS: len(truth)} if alpha else {"ss_network_alpha in the header": len(truth)})


def test_onetrainers_bundled_tokens_are_named(pipes, tmp_path):
    """The layers are applied where the user allows a part; the tokens are named as what they are."""
    path, truth = write(pipes["flux"], tmp_path / "a.safetensors", omi, "lora_{}.weight")
    extra = {f"bundle_emb.owl.{part}": torch.ones(2, 16) for part in ("clip_l", "t5", "clip_l_out", "t5_out")}
    save_file(load_file(path) | extra, path)
    with pytest.raises(Refused, match="textual inversion"):
        reader.read(path, components(pipes["flux"]), "flux")
    found = reader.read(path, components(pipes["flux"]), "flux", allow_partial=True)
    check(found, truth)
    (keys,) = found.receipt.ignored.values()
    assert set(keys) == set(extra)


def stock(make, path):
    """The update that stock diffusers makes of a file, by component and path."""
    pipe = make()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="one")
    return {(name, where): module.get_delta_weight("one").detach() for name, part in components(pipe).items()
            for where, module in part.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(("family", "name", "role"), [
    ("flux", lambda part, path: f"{part}.{path}", "lora_{AB}.weight"),
    ("flux", lambda part, path: f"lora_transformer_{flat(path)}", "lora_{}.weight"),
    ("sd3", lambda part, path: f"{part}.{path}", "lora_{AB}.weight"),
    ("sd", lambda part, path: f"lora_unet_{flat(path)}", "lora_{}.weight"),
    ("sdxl", lambda part, path: f"{part}.{path}", "lora_{AB}.weight"),
], ids=["ai-toolkit", "onetrainer", "sd3", "kohya-sd", "ai-toolkit-sdxl"])
def test_stock_reads_the_same(family, name, role, tmp_path):
    """Attention layers, without alpha where the trainer writes none."""
    make = FAMILIES[family]

    def spelled(pipe, component, path):
        return "" if component.startswith("text") or not re.search(r"attn\d?\.to_", path) else name(component, path)

    path, truth = write(make(), tmp_path / "a.safetensors", spelled, role, alpha=None if "AB" in role else 1.0, dtype=torch.float32)
    pipe = make()
    found = reader.read(path, components(pipe), family)
    theirs = stock(make, path)
    assert set(theirs) == set(truth) and truth
    for (part, where), update in theirs.items():
        one = found.factors[part][where]
        torch.testing.assert_close((one.up.flatten(1) @ one.down.flatten(1)).reshape(update.shape), update, rtol=1e-5, atol=1e-5)


def test_what_peft_says_of_training_is_said(pipes, tmp_path):
    """DoRA without magnitudes, and factors that were started from the base's own singular vectors, are not what their numbers alone are."""
    path, _ = write(pipes["sd"], tmp_path / "a.safetensors", lambda pipe, component, path: f"unet.{path}" if component == "unet" else "", "lora_{AB}.weight")
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": RANK, "lora_alpha": 1, "use_dora": True, "init_lora_weights": "pissa_niter_4"}))
    said = " ".join(reader.read(path, components(pipes["sd"]), "sd").receipt.remarks)
    assert "use_dora" in said and "pissa_niter_4" in said
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "init_lora_weights": True}))
    assert not reader.read(path, components(pipes["sd"]), "sd").receipt.remarks[1:]
