"""What is left out of a LoRA file and why, whose LoRA it is, and what its header says."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from composition.loras import keys as lora_keys
from composition.loras import reader
from composition.refusal import Refused
from tests import toys
from tests.composition.loras import lora_writers as writers
from tests.composition.loras.test_layers import UNETS


@pytest.fixture(scope="module")
def pipe():
    return toys.sd()


@pytest.fixture(scope="module")
def parts(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


@pytest.fixture(scope="module")
def made(pipe):
    return writers.updates(pipe, every=12, dtype=torch.float32)


@pytest.fixture(scope="module")
def real():
    """Bases of true size without weights: "sd" (768), "sd2" (1024), "sdxl"."""

    def text(kind, width, depth):
        config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, vocab_size=9)
        return kind(config)

    with torch.device("meta"):
        return {
            "sd": {"unet": UNet2DConditionModel(**UNETS["sd"]), "text_encoder": text(CLIPTextModel, 768, 12)},
            "sd2": {
                "unet": UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                                             use_linear_projection=True),
                "text_encoder": text(CLIPTextModel, 1024, 23),
            },
            "sdxl": {
                "unet": UNet2DConditionModel(**UNETS["sdxl"]), "text_encoder": text(CLIPTextModel, 768, 12),
                "text_encoder_2": text(CLIPTextModelWithProjection, 1280, 32),
            },
        }  # fmt: skip


def law(receipt) -> None:
    keys = [key for keys in receipt.ignored.values() for key in keys]
    assert len(set(keys)) == len(keys) and receipt.applied + len(keys) == receipt.tensors
    assert sum(part["tensors"] for part in receipt.components.values()) == receipt.applied


def kohya(pipe, made, **extra):
    """A kohya file of `made` and tensors beside: (tensors, the key of its first module)."""
    tensors, _ = writers.WRITERS["kohya"](pipe, made)
    head = next(key for key in tensors if key.endswith("lora_down.weight")).removesuffix(".lora_down.weight")
    return tensors | {name.replace("HEAD", head): one for name, one in extra.items()}, head


ONE = torch.ones(2, 2)
BLOCKED = {
    "HEAD.hada_w1_a": reader.NO_WHOLE,
    "HEAD.lokr_w1": reader.NO_WHOLE,
    "HEAD.oft_blocks": reader.NO_WHOLE,
    "HEAD.on_input": reader.NO_WHOLE,
    "HEAD.a1.weight": reader.NO_WHOLE,
    "HEAD.diff": reader.NO_WHOLE,
    "HEAD.oft_r": lora_keys.OFT,
    "HEAD.oft_diag": lora_keys.OFT,
    "HEAD.lora_A.bias": lora_keys.BIAS,
    "HEAD.lora_down.bias": lora_keys.BIAS,
    "HEAD.hada_novelty": lora_keys.PART,
    "HEAD.lora_novelty": lora_keys.PART,
    "HEAD.scalar": lora_keys.PART,
    "HEAD.lora_A.other.weight": lora_keys.TWICE,
}
BESIDE = {
    "HEAD.set_weight": lora_keys.FULL,
    "HEAD.weight": lora_keys.FULL,
    "unet.conv_norm_out.weight": lora_keys.FULL,
    "<s1>": lora_keys.TOKEN,
    "bundle_emb.owl.string_to_param.*": lora_keys.TOKEN,
    "emb_params": lora_keys.TOKEN,
    "anything": lora_keys.UNKNOWN,
    "lora_unet_nowhere.alpha": reader.NO_PAIR,
    "lora_unet_down_blocks_0_resnets_0_conv2.lora_down.weight": reader.NO_PAIR,
}


@pytest.mark.parametrize("key", BLOCKED)
def test_half_an_update_is_never_applied(key, pipe, parts, made, tmp_path):
    """A tensor that changes what the pair means takes its whole module out, and only that."""
    tensors, head = kohya(pipe, made, **{key: ONE})
    path = writers.save(tmp_path / "owl.safetensors", (tensors, {}))
    with pytest.raises(Refused, match="allow-partial"):
        reader.read(path, parts, "sd")
    lora = reader.read(path, parts, "sd", allow_partial=True)
    law(lora.receipt)
    left = {one for one in tensors if one.startswith(f"{head}.")}
    assert {reason: set(keys) for reason, keys in lora.receipt.ignored.items()} == {BLOCKED[key]: left}
    assert made[0].path not in lora.factors[made[0].component]
    assert sum(len(inside) for inside in lora.factors.values()) == len(made) - 1


@pytest.mark.parametrize("key", BESIDE)
def test_what_stands_beside_is_left_alone(key, pipe, parts, made, tmp_path):
    tensors, _ = kohya(pipe, made, **{key: ONE})
    path = writers.save(tmp_path / "owl.safetensors", (tensors, {}))
    with pytest.raises(Refused) as refused:
        reader.read(path, parts, "sd")
    found = [name for name in tensors if name not in kohya(pipe, made)[0]]
    assert all(words in str(refused.value) for words in (BESIDE[key], "1 of its", found[0]))
    lora = reader.read(path, parts, "sd", allow_partial=True)
    law(lora.receipt)
    assert lora.receipt.ignored == {BESIDE[key]: tuple(found)}
    assert sum(len(inside) for inside in lora.factors.values()) == len(made)


def test_alone_none_of_these_is_a_lora(pipe, parts, made, tmp_path):
    for key in [*BLOCKED, *BESIDE]:
        path = writers.save(tmp_path / "a.safetensors", ({key.replace("HEAD", "lora_unet_conv_in"): ONE}, {}))
        with pytest.raises(Refused):
            reader.read(path, parts, "sd", allow_partial=True)
        law(reader.inspect(path))


def test_same_layer_twice(pipe, parts, made, tmp_path):
    """Two spellings of one layer: nothing says which is meant, so neither is used, and it is refused by default."""
    for layout in ("peft", "kohya-sgm", "peft-default"):
        tensors, _ = writers.WRITERS[layout](pipe, made[:2])
        path = writers.save(tmp_path / "a.safetensors", (kohya(pipe, made[1:3])[0] | tensors, {}))
        with pytest.raises(Refused, match="twice"):
            reader.read(path, parts, "sd")
        lora = reader.read(path, parts, "sd", allow_partial=True)
        law(lora.receipt)
        assert len(lora.receipt.ignored[lora_keys.TWICE]) == 6 and lora.receipt.applied == 6
        assert list(lora.factors["unet"]) == [made[0].path, made[2].path]


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ABSENT = {  # names as files have them, and whether they are of a layer that this base lacks
    "unet.down_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q": True, "unet.mid_block.attentions.0.transformer_blocks.7.ff.net.2": True,
    "lora_unet_down_blocks_0_attentions_5_transformer_blocks_0_attn2_to_q": True, "lora_unet_input_blocks_30_1_proj_in": True,
    "lora_unet_mid_block_attentions_3_proj_out": True, "lora_te_text_model_encoder_layers_40_mlp_fc1": True,
    "unet.up_blocks.0.upsamplers.0.conv": None, "lora_unet_add_embedding_linear_1": True, "unet.down_blocks.0.resnets.4.conv_shortcut": True,
    f"unet.{BLOCK}.attn1.toq": False, "lora_unet_down_blocks_0_attentoins_0_transformer_blocks_0_attn1_to_q": False,
    f"unet.{BLOCK}.attn1.to_q.linear": False, f"unet.encoder.{BLOCK}.attn1.to_q": False, f"unet.model.{BLOCK}.attn1.to_q": False,
    "lora_unet_sformer_blocks_0_attn_to_q": False, f"lykoris_{BLOCK.replace('.', '_')}_attn1_to_q": False, "unet.x" + "_x" * 400: False,
    f"models.diffusion_model.{BLOCK}.attn1.to_q": False, "lora_te_text_model_encoder_layers_0_self_attn_qproj": False,
}  # fmt: skip


@pytest.mark.parametrize("name", ABSENT)
def test_a_layer_that_is_not_there_and_a_name_that_is_none(name, pipe, parts, made, tmp_path):
    """"No such layer" is said of a layer's name alone; of any other that its spelling is not known."""
    tensors = kohya(pipe, made)[0] | {f"{name}.lora_A.weight": ONE, f"{name}.lora_B.weight": ONE, f"{name}.alpha": torch.tensor(2.0)}
    path = writers.save(tmp_path / "a.safetensors", (tensors, {}))
    if ABSENT[name] is None:  # there, of another shape
        with pytest.raises(Refused, match="do not fit"):
            reader.read(path, parts, "sd", allow_partial=True)
        return
    receipt = reader.read(path, parts, "sd", allow_partial=True).receipt
    law(receipt)
    assert list(receipt.ignored) == [reader.NO_LAYER if ABSENT[name] else reader.NO_NAME]


def test_a_part_the_base_has_not(pipe, parts, made, tmp_path):
    path = writers.save(tmp_path / "a.safetensors", (kohya(pipe, made)[0], {}))
    receipt = reader.read(path, {"unet": pipe.unet}, "sd", allow_partial=True).receipt
    law(receipt)
    assert list(receipt.ignored) == ["this base has no text_encoder"] and list(receipt.components) == ["unet"]
    with pytest.raises(Refused, match="none of its"):
        reader.read(path, {"vae": nn.Linear(2, 2)}, "sd", allow_partial=True)


def test_whole_numbers_are_no_factors(pipe, parts, made, tmp_path):
    tensors, head = kohya(pipe, made)
    tensors[f"{head}.lora_up.weight"] = tensors[f"{head}.lora_up.weight"].to(torch.int8)
    path = writers.save(tmp_path / "a.safetensors", (tensors, {}))
    assert len(reader.read(path, parts, "sd", allow_partial=True).receipt.ignored[reader.NO_FLOAT]) == 3


def test_no_effect(pipe, parts, made, tmp_path):
    """A zero up, a zero down, an alpha of 0: applied, and named."""
    tensors, _ = kohya(pipe, made)
    keys = sorted({key.split(".")[0] for key in tensors})[:3]
    for key in (f"{keys[0]}.lora_up.weight", f"{keys[1]}.lora_down.weight", f"{keys[2]}.alpha"):
        tensors[key] = torch.zeros_like(tensors[key])
    path = writers.save(tmp_path / "a.safetensors", (tensors, {}))
    receipt = reader.read(path, parts, "sd").receipt
    assert len(receipt.no_effect) == 3 == len(reader.inspect(path).no_effect)
    assert {name.replace("text_encoder.", "lora_te_text_model_").replace("unet.", "lora_unet_").replace(".", "_")
            for name in receipt.no_effect} == set(keys)


def test_alpha_of_any_number_kind(pipe, parts, made, tmp_path):
    tensors, head = kohya(pipe, made)
    for dtype in (torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float64):
        tensors[f"{head}.alpha"] = torch.tensor([4.0]).to(dtype)
        receipt = reader.read(writers.save(tmp_path / "a.safetensors", (tensors, {})), parts, "sd").receipt
        assert receipt.alphas == {2.0: len(made) - 1, 4.0: 1}


def test_header_says_who_it_is(pipe, parts, made, tmp_path):
    said = {"title": " The\nOwl ", "category": "Character", "trigger_words": "sks owl, night , ,night", "ss_x": "<b>"}
    tensors, _ = kohya(pipe, made)
    path = writers.save(tmp_path / "owl v1.2.safetensors", (tensors, said))
    receipt = reader.read(path, parts, "sd").receipt
    assert (receipt.name, receipt.title, receipt.category) == ("owl v1.2", "The Owl", "character")
    assert receipt.triggers == ("sks owl", "night") and receipt.metadata == said and receipt.path == str(path)
    assert reader.read(path, parts, "sd", name="owl#2").receipt.name == "owl#2"
    model = {"modelspec.title": "T", "modelspec.trigger_phrase": "a b", "category": "weird", "ss_tag_frequency": "{}"}
    other = reader.read(writers.save(tmp_path / "b.safetensors", (tensors, model)), parts, "sd").receipt
    assert (other.title, other.category, other.triggers) == ("T", "", ("a b",))
    assert other.tensor_sha256 == receipt.tensor_sha256 and other.sha256 != receipt.sha256
    tensors["<s1>"] = ONE
    assert reader.inspect(writers.save(path, (tensors, said))).tensor_sha256 != receipt.tensor_sha256


def test_inspect_without_a_base(pipe, made, tmp_path):
    path = writers.save(tmp_path / "a.safetensors", writers.metadata_alphas(pipe, made))
    receipt = reader.inspect(path)
    law(receipt)
    assert receipt.ignored == {reader.NO_BASE: tuple(sorted(receipt.ignored[reader.NO_BASE]))} and receipt.applied == 0
    assert receipt.ranks == {2: len(made)} and receipt.layout == "diffusers" and receipt.family == "unknown"


@pytest.mark.parametrize("settings", [
    "not json", "[]", "[" * 100_000, '{"unet.lora_alpha": "4"}', '{"unet.lora_alpha": true}',
    '{"unet.lora_alpha": NaN}', '{"unet.alpha_pattern": [1]}', '{"unet.alpha_pattern": {".*(?=a)": 3}}',
])  # fmt: skip
def test_header_alphas_that_cannot_be_read(settings, pipe, parts, made, tmp_path):
    tensors, _ = writers.metadata_alphas(pipe, made)
    with pytest.raises(Refused, match="lora_adapter_metadata"):
        path = writers.save(tmp_path / "a.safetensors", (tensors, {"lora_adapter_metadata": settings}))
        reader.read(path, parts, "sd")


def pair(key: str, inputs: int, outputs: int, words: str = "kohya") -> dict[str, torch.Tensor]:
    down, up = (".lora_down", ".lora_up") if words == "kohya" else (".lora_A", ".lora_B")
    return {f"{key}{down}.weight": torch.ones(1, inputs), f"{key}{up}.weight": torch.ones(outputs, 1)}


DEEP = "lora_unet_input_blocks_8_1_transformer_blocks_9_"
FIRST = "down_blocks_0_attentions_0_transformer_blocks_0_"
JOINT = "transformer_blocks.0.attn.to_q"
FOREIGN = {
    "sd": (pair(f"lora_unet_{FIRST}attn2_to_k", 768, 320), ("sd2", "sdxl"), "SD 1.x (text width 768)"),
    "sd2": (pair(f"lora_unet_{FIRST}attn2_to_k", 1024, 320), ("sd", "sdxl"), "SD 2.x (text width 1024)"),
    "sdxl": (pair(f"{DEEP}attn2_to_k", 2048, 1280), ("sd", "sd2"), "SDXL (text width 2048)"),
    "sdxl-deep": (pair(f"{DEEP}attn1_to_k", 1280, 1280), ("sd", "sd2"), "SDXL"),
    "sdxl-text": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, 5120), ("sd", "sd2"), "SDXL"),
    "flux": (pair("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216), ("sd", "sdxl"), "FLUX"),
    "flux-single": (pair(f"transformer.single_{JOINT}", 3072, 3072, "peft"), ("sd", "sdxl"), "FLUX"),
    "flux-double": (pair(f"transformer.{JOINT}", 3072, 3072, "peft"), ("sd", "sdxl"), "FLUX"),
    "sd3": (pair(f"transformer.{JOINT}", 1536, 1536, "peft"), ("sd", "sdxl"), "SD 3"),
    "sd3-kohya": (pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, 4608), ("sd", "sdxl"), "SD 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_made_for_another_family(case, real, tmp_path):
    """In plain words, with both named, also when partial files are allowed."""
    tensors, bases, words = FOREIGN[case]
    path = writers.save(tmp_path / "owl.safetensors", (tensors, {"ss_base_model_version": "a lie"}))
    assert reader.inspect(path).family == case.split("-")[0]
    for base in bases:
        with pytest.raises(Refused) as refused:
            reader.read(path, real[base], base.removesuffix("2"), allow_partial=True)
        named = {"sd": "SD with text width 768", "sd2": "SD with text width 1024", "sdxl": "SDXL with text width 2048"}
        assert str(refused.value) == f"owl.safetensors: made for {words}; this base is {named[base]}"


def test_unknown_model_and_wrong_width(real, tmp_path):
    path = writers.save(tmp_path / "a.safetensors", (pair("transformer.blocks.0.attn.to_q", 5120, 5120, "peft"), {}))
    assert reader.inspect(path).family == "unknown"
    with pytest.raises(Refused, match="none of its 2 tensors can be applied to this base .SD with text width 768"):
        reader.read(path, real["sd"], "sd", allow_partial=True)
    path = writers.save(tmp_path / "b.safetensors", (pair(f"lora_unet_{FIRST}attn1_to_k", 640, 640), {}))
    with pytest.raises(Refused, match="another width"):
        reader.read(path, real["sd"], "sd", allow_partial=True)


@pytest.mark.parametrize("base", ["sd", "sd2", "sdxl"])
def test_true_sizes(base, real, tmp_path):
    """A rank-1 LoRA of every attention of a base of true size is read whole, and its family is known."""
    tensors = {}
    for component, module in real[base].items():
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and ("attn" in path or "proj_in" in path):
                tensors |= pair(f"{component}.{path}", layer.in_features, layer.out_features, "peft")
    path = writers.save(tmp_path / "a.safetensors", ({key: one.half() for key, one in tensors.items()}, {}))
    receipt = reader.read(path, real[base], base.removesuffix("2")).receipt
    assert receipt.family == base and receipt.coverage == 1.0
    assert list(receipt.components) == list(real[base])


FOLDER = os.environ.get("MEDLEY_REAL_LORAS", "")


@pytest.mark.skipif(not FOLDER, reason="MEDLEY_REAL_LORAS names no folder of LoRA files for SD 1.5")
def test_real_files(real):
    """Community files for SD 1.5: all is applied but learned tokens."""
    paths = sorted(Path(FOLDER).glob("*.safetensors"))
    assert paths
    for path in paths:
        law(reader.inspect(path))
        receipt = reader.read(path, real["sd"], "sd", allow_partial=True).receipt
        law(receipt)
        assert receipt.family == "sd" and set(receipt.ignored) <= {lora_keys.TOKEN} and not receipt.no_effect
        print(receipt.line(), receipt.layout)
