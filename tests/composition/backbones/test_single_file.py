"""Single-file checkpoints: the kind by names and shapes, the same tensors as the folder, no network."""

import socket
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from composition.backbones.loading import clip_tokenizer, single_file
from composition.backbones.loading import open as opening
from composition.refusal import Refused
from tests import toys

LAYOUTS = {"sd15": toys.sd, "sd2": toys.sd, "sdxl": toys.sdxl}


# The inverse renaming, written from the layout of the published files.
def _unet(pipe) -> dict[str, Tensor]:
    found = {}
    for key, weight in pipe.unet.state_dict().items():
        module, _, tail = key.rpartition(".")
        found[f"model.diffusion_model.{toys.sgm_path(pipe, module)}.{tail}"] = weight
    return found


def _vae(vae: nn.Module, levels: int = 2) -> dict[str, Tensor]:
    found = {}
    for key, weight in vae.state_dict().items():
        name = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        for old, new in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(f"mid_block.attentions.0.{old}", f"mid.attn_1.{new}")
        for level in range(levels):
            name = name.replace(f"encoder.down_blocks.{level}.", f"encoder.down.{level}.")
            name = name.replace(f"decoder.up_blocks.{level}.", f"decoder.up.{levels - 1 - level}.")
        for old, new in (("resnets", "block"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                         ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")):
            name = name.replace(old, new)
        is_matrix = "attn_1" in name and weight.dim() == 2
        found[f"first_stage_model.{name}"] = weight[..., None, None] if is_matrix else weight
    return found


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {key.removeprefix("text_model."): weight for key, weight in model.state_dict().items()}


def _clip(model: nn.Module, prefix: str, inner: str = "text_model.") -> dict[str, Tensor]:
    return {f"{prefix}{inner}{key}": weight for key, weight in _plain(model).items()}


def _open_clip(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    weights, found = _plain(model), {}
    for name, key in (("positional_embedding", "embeddings.position_embedding.weight"),
                      ("token_embedding.weight", "embeddings.token_embedding.weight"),
                      ("ln_final.weight", "final_layer_norm.weight"), ("ln_final.bias", "final_layer_norm.bias")):
        found[prefix + name] = weights[key]
    if "text_projection.weight" in weights:
        found[f"{prefix}text_projection"] = weights["text_projection.weight"].T.contiguous()
    for layer in range(2):
        old, new = f"encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [weights[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
            for name, key in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                              ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                found[f"{new}{name}.{kind}"] = weights[f"{old}{key}.{kind}"]
    return found


def tensors(pipe, layout: str) -> dict[str, Tensor]:
    """The pipe's weights as a published checkpoint has them, with the leftovers those have too."""
    found = {**_unet(pipe), **_vae(pipe.vae), "alphas_cumprod": torch.ones(1000),
             "model_ema.diffusion_modeltime_embed0weight": torch.zeros(4, 4)}
    if layout == "sd15":
        found |= _clip(pipe.text_encoder, "cond_stage_model.transformer.")
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif layout == "sd2":
        found |= _open_clip(pipe.text_encoder, "cond_stage_model.model.")
        last = {key: weight for key, weight in found.items() if ".resblocks.1." in key}
        found |= {key.replace(".resblocks.1.", ".resblocks.2."): weight * 0 for key, weight in last.items()}  # unused
    else:
        found |= _clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        found |= _open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
        found["conditioner.embedders.1.model.logit_scale"] = torch.tensor(1.0)
    return found


def write(path: Path, found: dict[str, Tensor], **metadata: str) -> Path:
    save_file({key: weight.contiguous().clone() for key, weight in found.items()}, path, {"format": "pt", **metadata})
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def toy_words(pad: str):
    return toys.tokenizer(pad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_it_equals_the_folder_tensor_by_tensor(layout: str, stored: torch.dtype, tmp_path: Path, offline: None) -> None:
    pipe = LAYOUTS[layout]()
    pipe.save_pretrained(tmp_path / "folder")
    found = {key: weight.to(stored) if weight.is_floating_point() else weight
             for key, weight in tensors(pipe, layout).items()}
    file = write(tmp_path / "toy.safetensors", found, **{"modelspec.prediction_type": "epsilon"})
    assert single_file.kind(single_file.header(file)[0]) == layout
    opened = single_file.load(file, torch.float32, config=tmp_path / "folder", tokenizer=toy_words)
    assert type(opened) is type(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            made = getattr(opened, name).state_dict()
            assert made.keys() == part.state_dict().keys(), name
            for key, weight in part.state_dict().items():
                expected = weight.to(stored).to(torch.float32) if weight.is_floating_point() else weight
                assert torch.equal(made[key], expected), (name, key)
                assert not weight.is_floating_point() or made[key].dtype == torch.float32
    if stored is torch.float32:
        opened.set_progress_bar_config(disable=True)
        pictures = [one("a fox", num_inference_steps=2, generator=torch.Generator().manual_seed(3),
                        output_type="latent").images for one in (pipe, opened)]
        assert layout == "sd2" or torch.equal(*pictures)  # the toy's own pad token differs from sd2's


def test_old_names_without_text_model(tmp_path: Path, offline: None) -> None:
    pipe = toys.sd()
    pipe.save_pretrained(tmp_path / "folder")
    found = {**_unet(pipe), **_vae(pipe.vae), **_clip(pipe.text_encoder, "cond_stage_model.transformer.", inner="")}
    opened = single_file.load(write(tmp_path / "old.safetensors", found), torch.float32, config=tmp_path / "folder",
                              tokenizer=toy_words)
    assert all(torch.equal(a, b) for a, b in zip(opened.text_encoder.parameters(), pipe.text_encoder.parameters(),
                                                 strict=True))


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: {k: v for k, v in f.items() if not k.startswith("first_stage")}, "VAE baked in"),
    (lambda f: {k: v for k, v in f.items() if not k.startswith("cond_stage")}, "without its text encoder"),
    (lambda f: {k: v for k, v in f.items() if k.startswith("first_stage")}, "is a VAE"),
    (lambda f: f | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}, "inpainting model"),
    (lambda f: f | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 8, 3, 3)}, "pix2pix"),
    (lambda f: f | {"conditioner.embedders.0.model.ln_final.weight": torch.zeros(2)}, "SDXL refiner"),
    (lambda f: {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(1)}, "give it as a LoRA"),
    (lambda f: {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(1)}, "give it as a LoRA"),
    (lambda f: {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "opens from its diffusers folder"),
    (lambda f: {"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}, "opens from its diffusers folder"),
    (lambda f: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "one component"),
    (lambda f: {"emb_params": torch.zeros(1)}, "textual-inversion"),
    (lambda f: {"weight": torch.zeros(1)}, "is not a checkpoint of a known kind"),
])
def test_what_is_no_base_model_is_refused_by_names_alone(change, words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", change(tensors(toys.sd(), "sd15")))
    with pytest.raises(Refused, match=words):
        opening.find(str(file))


def test_missing_and_misshapen_weights_are_refused(tmp_path: Path) -> None:
    pipe = toys.sd()
    pipe.save_pretrained(tmp_path / "folder")
    found = tensors(pipe, "sd15")
    for part, key in (("unet", "model.diffusion_model.time_embed.0.bias"),
                      ("vae", "first_stage_model.decoder.conv_in.bias"),
                      ("text_encoder", "cond_stage_model.transformer.text_model.final_layer_norm.bias")):
        file = write(tmp_path / "less.safetensors", {name: weight for name, weight in found.items() if name != key})
        with pytest.raises(Refused, match=f"incomplete: weights of its {part} are missing"):
            single_file.load(file, torch.float32, config=tmp_path / "folder", tokenizer=toy_words)
    with pytest.raises(Refused, match="looks like Stable Diffusion 1.x but its unet does not fit"):
        single_file.load(write(tmp_path / "small.safetensors", found), torch.float32, tokenizer=toy_words)
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(Refused, match="download it again"):
        opening.find(str(tmp_path / "broken.safetensors"))


def test_what_the_unet_predicts() -> None:
    class Fake(nn.Module):
        def __init__(self, answer) -> None:
            super().__init__()
            self.weight, self.answer = nn.Parameter(torch.zeros(1)), answer
            self.config = type("Config", (), {"in_channels": 4, "cross_attention_dim": 8})()

        def forward(self, x: Tensor, t: int, prompt: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (self.answer(x),)

    epsilon = Fake(lambda x: x + 0.2 * torch.randn_like(x))
    velocity = Fake(lambda x: 0.07 * x - torch.randn_like(x))
    assert single_file.predicts_noise(epsilon) and not single_file.predicts_noise(velocity)
    ask = single_file.prediction
    assert ask("sd2", {}, {}, epsilon) == {"prediction_type": "epsilon"}
    assert ask("sd2", {}, {}, velocity) == {"prediction_type": "v_prediction"}
    assert ask("sd2", {}, {"modelspec.prediction_type": "v"}, epsilon) == {"prediction_type": "v_prediction"}
    assert ask("sdxl", {}, {}, velocity) == {"prediction_type": "epsilon"}
    assert ask("sdxl", {"v_pred": ()}, {}, epsilon)["prediction_type"] == "v_prediction"
    assert ask("sdxl", {"v_pred": (), "ztsnr": ()}, {}, epsilon)["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize(("kind", "unet", "vae", "text"), [
    ("sd15", 859_520_964, 83_653_863, 123_060_480),
    ("sd2", 865_910_724, 83_653_863, 340_387_840),
    ("sdxl", 2_567_463_684, 83_653_863, 123_060_480),
])
def test_shipped_configurations_have_the_true_sizes(kind: str, unet: int, vae: int, text: int, offline: None) -> None:
    folder = str(single_file.CONFIGS / kind)

    def size(model: nn.Module) -> int:
        return sum(weight.numel() for weight in model.parameters())

    with torch.device("meta"):
        for model, name, expected in ((UNet2DConditionModel, "unet", unet), (AutoencoderKL, "vae", vae)):
            assert size(model.from_config(model.load_config(folder, subfolder=name))) == expected
        assert size(CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))) == text
        if kind == "sdxl":
            config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2")
            assert size(CLIPTextModelWithProjection(config)) == 694_659_840


def test_tokenizer_from_merges_is_clips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: None) -> None:
    pairs = [tuple(merge.split(" ")) for merge in toys.MERGES]
    built, toy = clip_tokenizer.build(pairs, "!"), toys.tokenizer("!")
    for text in ("a fox and the owl", "Ünïcode   spaces\n\ttabs, 4k!! 🦊 it's"):
        assert built(text).input_ids == toy(text).input_ids
    assert built.get_vocab() == toy.get_vocab() and built.model_max_length == 77 and built.pad_token == "!"

    letters = [word for word, index in toy.get_vocab().items() if index < 256]
    lines = [f"{one} {other}" for one in letters for other in letters][: clip_tokenizer.MERGES]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    merges = clip_tokenizer.read(tmp_path / "merges.txt")
    assert merges is not None and len(merges) == clip_tokenizer.MERGES and list(merges[-1]) == lines[-1].split()
    (tmp_path / "short.txt").write_text("\n".join(lines[:10]), encoding="utf-8")
    assert clip_tokenizer.read(tmp_path / "short.txt") is None and clip_tokenizer.read(tmp_path / "absent") is None

    clip_tokenizer._merges.cache_clear()
    monkeypatch.setattr(clip_tokenizer, "_candidates", lambda: iter([tmp_path / "absent"]))
    with pytest.raises(Refused, match="pip install open-clip-torch"):
        clip_tokenizer.tokenizer()
    monkeypatch.setattr(clip_tokenizer, "_candidates", lambda: iter([tmp_path / "merges.txt"]))
    try:
        assert len(clip_tokenizer.tokenizer()) == 49_408
    finally:
        clip_tokenizer._merges.cache_clear()


def test_open_clips_vocabulary_when_it_is_installed(offline: None) -> None:
    clip_tokenizer._merges.cache_clear()
    packed = [path for path in clip_tokenizer._candidates() if path.suffix == ".gz" and path.is_file()]
    if not packed:
        pytest.skip("open-clip-torch is not installed")
    words = clip_tokenizer.tokenizer()
    ids = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert words("a photo of an astronaut riding a horse on mars").input_ids == ids and len(words) == 49_408
