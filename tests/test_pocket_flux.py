"""Pocket-FLUX as it ships: the stock FluxPipeline runs it, makes Medley's pictures, and its LoRAs are read in every layout."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from composition import Engine, Lora, Request
from composition.loras import reader as lora_files
from composition.refusal import Refused
from retrieval.judge import Judge
from tests.reference import psnr

POCKET = Path(str(files("assets"))) / "pocket"
LORAS = sorted((POCKET / "flux-loras").glob("*.safetensors"))
PROMPT = "a raccoon and an owl on the moon"
CALL = {"num_inference_steps": 25, "true_cfg_scale": 4.5, "negative_prompt": "", "width": 64, "height": 64}


@pytest.fixture(scope="module")
def engine():
    with Engine.open("pocket-flux", device="cpu") as engine:
        yield engine


@pytest.fixture
def pipe():
    pipe = FluxPipeline.from_pretrained(POCKET / "flux", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, prompt=PROMPT, seed=7, length=64):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), max_sequence_length=length, **CALL).images[0]


def test_stock_diffusers_runs_it_and_makes_our_picture(engine, pipe):
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype, pipe.text_encoder_2.dtype} == {torch.float32}
    ours = engine.run(Request(PROMPT, seed=7, steps=25, guidance=4.5)).images[0]
    assert psnr(picture(pipe), ours) > 60
    assert engine.run(Request(PROMPT, seed=7)).images[0].tobytes() == ours.tobytes(), "25 steps and 4.5 are its usual"


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.9, 0.4, 0.7)])
def test_merge_is_stock_diffusers_with_the_same_three_loras(engine, pipe, weights):
    """load_lora_weights and set_adapters, as any user would: over 40 dB; and far from the picture without LoRAs."""
    names = ("raccoon", "owl", "moon")
    for name in names:
        pipe.load_lora_weights(str(POCKET / "flux-loras"), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(list(names), list(weights))
    stock = picture(pipe)
    loras = [Lora(name, weight) for name, weight in zip(names, weights, strict=True)]
    ours = engine.run(Request(PROMPT, loras=loras, method="merge", seed=7)).images[0]
    assert psnr(stock, ours) > 40
    assert psnr(engine.run(Request(PROMPT, seed=7)).images[0], ours) < 30


@pytest.mark.parametrize("length", [20, 40, 64, 128, 512])
def test_padding_of_any_length_leaves_what_the_prompt_says(pipe, length):
    """The stock pipeline pads T5's text and lets the padding be attended to: 512 unless told otherwise."""
    judge = Judge.open("pocket")
    seen = picture(pipe, "a panda in the snow", seed=3, length=length)
    assert judge.present([seen], ["a panda", "in the snow"]).all()
    assert not judge.present([seen], ["a car", "in the desert"]).any()


def test_every_bundled_lora_applies_whole_and_shows(engine):
    found = [path.stem for path in engine.loras()]
    assert len(found) >= 6
    plain = engine.run(Request("a fox in the snow", seed=3, steps=10)).images[0]
    for name in found:
        receipt = engine.inspect(name)
        assert receipt.coverage == 1.0 and not receipt.ignored and not receipt.no_effect, receipt.line()
        assert receipt.family == "flux" and receipt.title and receipt.category and receipt.triggers, name
        changed = engine.run(Request(f"a fox in the snow, {receipt.triggers[0]}", loras=[Lora(name)], seed=3, steps=10)).images[0]
        assert psnr(plain, changed) < 30, name


def test_a_lora_of_the_other_pocket_is_refused_in_plain_words(engine):
    with pytest.raises(Refused, match="this base is FLUX"):
        engine.inspect(str(POCKET.parent / "pocket128/loras/raccoon.safetensors"))


def test_two_animals_have_places_of_their_own(engine):
    """Neither is a word that the base knows. By what each LoRA changes, places part, and both animals are found more often than by Merge."""
    judge, pair = Judge.open("pocket"), ("raccoon", "owl")
    found = {}
    for method in ("merge", "clora-fast"):
        made = engine.run(Request("a raccoon and an owl in the snow", loras=[Lora(name) for name in pair], method=method, seed=41, count=6))
        found[method] = int(judge.present(made.images, ["a raccoon", "an owl"]).all(1).sum())
    masks = [torch.tensor(made.notes["masks"][name]["mask"]).float() / 255 for name in pair]
    assert made.notes["clora"]["maps"] == "change" and float((masks[0] * masks[1]).mean()) < 0.02  # where both changes are equal, both
    assert all(0.1 < float(mask.mean()) < 0.9 for mask in masks)
    assert found["clora-fast"] >= max(4, found["merge"] + 1), found


# The layers of the authors' code that hold several of diffusers', by the rules of BFL's reference code; each other one stands alone.
FUSED = {
    "transformer_blocks.{}.attn": (("double_blocks.{}.img_attn.qkv", ("to_q", "to_k", "to_v")),
                                   ("double_blocks.{}.txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))),
    "single_transformer_blocks.{}": (("single_blocks.{}.linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),),
}  # fmt: skip
ALONE = {
    "transformer_blocks.{}.attn.to_out.0": "double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_add_out": "double_blocks.{}.txt_attn.proj",
    "transformer_blocks.{}.ff.net.0.proj": "double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.2": "double_blocks.{}.img_mlp.2",
    "transformer_blocks.{}.ff_context.net.0.proj": "double_blocks.{}.txt_mlp.0",
    "transformer_blocks.{}.ff_context.net.2": "double_blocks.{}.txt_mlp.2", "single_transformer_blocks.{}.proj_out": "single_blocks.{}.linear2",
}  # fmt: skip


def own(file):
    """Path in the transformer to (down, up) of the diffusers file."""
    tensors = load_file(file)
    paths = {key.removeprefix("transformer.").split(".lora_")[0] for key in tensors}
    return {path: tuple(tensors[f"transformer.{path}.lora_{side}.weight"].float() for side in "AB") for path in paths}


def authored(pairs):
    """The same update by the authors' layers: factors of fused layers side by side, their rows one below the other."""
    left, found = dict(pairs), {}
    numbers = sorted({(path.split(".")[0], int(path.split(".")[1])) for path in pairs if path[0] in "ts" and path.split(".")[1].isdigit()})
    for kind, number in numbers:
        for head, groups in FUSED.items():
            for name, layers in groups if head.startswith(f"{kind}.") else ():
                parts = [left.pop(f"{head.format(number)}.{layer}") for layer in layers]
                found[name.format(number)] = torch.cat([down for down, _ in parts]), torch.block_diag(*(up for _, up in parts))
        for path, name in ALONE.items():
            if path.startswith(f"{kind}.") and path.format(number) in left:
                found[name.format(number)] = left.pop(path.format(number))
    if "proj_out" in left:
        found["final_layer.linear"] = left.pop("proj_out")
    assert not left, f"layers that this test cannot spell: {sorted(left)}"
    return found


def spelled(pairs, layout):
    if layout in ("kohya", "bfl"):
        pairs = authored(pairs)
    heads = {"kohya": lambda path: f"lora_unet_{path.replace('.', '_')}", "bfl": lambda path: f"diffusion_model.{path}",
             "onetrainer": lambda path: f"lora_transformer_{path.replace('.', '_')}", "ai-toolkit": lambda path: f"diffusion_model.{path}"}
    sides = ("lora_A", "lora_B") if layout == "bfl" else ("lora_down", "lora_up")
    tensors = {}
    for path, (down, up) in pairs.items():
        head = heads[layout](path)
        tensors |= {f"{head}.{sides[0]}.weight": down, f"{head}.{sides[1]}.weight": up}
        if layout in ("kohya", "onetrainer"):
            tensors[f"{head}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def test_its_attention_as_xlabs_writes_it_is_the_same_update(engine, tmp_path):
    """XLabs trains attention of the double blocks alone: 1 is the picture's side, 2 the text's."""
    file, pairs, tensors = tmp_path / "xlabs.safetensors", own(LORAS[0]), {}
    for name, (down, up) in authored(pairs).items():
        block, _, layer = name.rpartition(f".{name.split('.')[2]}.") if name.startswith("double_blocks") else ("", "", "")
        if layer in ("qkv", "proj"):
            head = f"{block}.processor.{layer}_lora{1 if '.img_attn.' in name else 2}"
            tensors |= {f"{head}.down.weight": down, f"{head}.up.weight": up}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    read = lora_files.read(file, {"transformer": engine.backbone.denoiser}, "flux")
    found = read.factors["transformer"]
    assert read.receipt.layout == "xlabs" and read.receipt.applied == len(tensors) == 4 * 2 * 3
    assert set(found) == {path for path in pairs if path.startswith("transformer_blocks") and ".attn." in path}
    for path, one in found.items():
        torch.testing.assert_close(one.up @ one.down, pairs[path][1] @ pairs[path][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["kohya", "bfl", "onetrainer"])
def test_its_loras_in_other_layouts_are_the_same_update(engine, layout, tmp_path):
    file, pairs = tmp_path / f"{layout}.safetensors", own(LORAS[0])
    tensors = spelled(pairs, layout)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    read = lora_files.read(file, {"transformer": engine.backbone.denoiser}, "flux")
    assert read.receipt.applied == len(tensors) and set(read.factors["transformer"]) == set(pairs)
    for path, (down, up) in pairs.items():
        one = read.factors["transformer"][path]
        torch.testing.assert_close(one.up @ one.down, up @ down, rtol=1e-4, atol=1e-6)
