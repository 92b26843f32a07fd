"""CLIPScore against independent ones on the same weights: torchmetrics through transformers, and the formula by hand."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from composition.backbones.loading import clip_tokenizer
from retrieval.judge import OUTER, Judge, Threshold, clip_score, sides

VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
LONG = "a fox and a robot on the moon beside a very old tree " * 12


def state(model):
    """open-clip's weights under transformers' names."""
    ours, theirs = model.state_dict(), {}
    for side, hf, width in (("visual.", "vision_model.", VISION["width"]), ("", "text_model.", TEXT["width"])):
        for n in range(2):
            block, layer = f"{side}transformer.resblocks.{n}.", f"{hf}encoder.layers.{n}."
            for kind in ("weight", "bias"):
                joined = ours[f"{block}attn.in_proj_{kind}"]
                for k, name in enumerate("qkv"):
                    theirs[f"{layer}self_attn.{name}_proj.{kind}"] = joined[k * width : (k + 1) * width]
                for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                             ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                    theirs[f"{layer}{b}.{kind}"] = ours[f"{block}{a}.{kind}"]
    for kind in ("weight", "bias"):
        theirs[f"vision_model.pre_layrnorm.{kind}"] = ours[f"visual.ln_pre.{kind}"]
        theirs[f"vision_model.post_layernorm.{kind}"] = ours[f"visual.ln_post.{kind}"]
        theirs[f"text_model.final_layer_norm.{kind}"] = ours[f"ln_final.{kind}"]
    theirs["vision_model.embeddings.class_embedding"] = ours["visual.class_embedding"]
    theirs["vision_model.embeddings.patch_embedding.weight"] = ours["visual.conv1.weight"]
    theirs["vision_model.embeddings.position_embedding.weight"] = ours["visual.positional_embedding"]
    theirs["text_model.embeddings.token_embedding.weight"] = ours["token_embedding.weight"]
    theirs["text_model.embeddings.position_embedding.weight"] = ours["positional_embedding"]
    theirs["visual_projection.weight"], theirs["text_projection.weight"] = ours["visual.proj"].T, ours["text_projection"].T
    theirs["logit_scale"] = ours["logit_scale"]
    return {name: tensor.clone().contiguous() for name, tensor in theirs.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One random CLIP in open-clip's layout and in transformers'."""
    root = tmp_path_factory.mktemp("clip")
    torch.manual_seed(4)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT).eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn_like(value)
    (root / "open").mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items() if name != "attn_mask"}, root / "open/open_clip_model.safetensors")
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
              "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}}
    (root / "open/open_clip_config.json").write_text(json.dumps(config))
    shape = {"hidden_act": "gelu", "num_hidden_layers": 2, "num_attention_heads": 2}
    hf = CLIPModel(CLIPConfig(
        projection_dim=16,
        text_config=shape | {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 49408, "max_position_embeddings": 77,
                             "eos_token_id": 49407, "bos_token_id": 49406, "projection_dim": 16},
        vision_config=shape | {"hidden_size": 32, "intermediate_size": 128, "image_size": 32, "patch_size": 8, "projection_dim": 16}))
    hf.load_state_dict(state(model), strict=True)
    hf.save_pretrained(root / "hf")
    picture = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    CLIPProcessor(picture, clip_tokenizer.tokenizer()).save_pretrained(root / "hf")
    return root


@pytest.fixture(scope="module")
def judge(folders):
    return Judge.open(str(folders / "open"))


class Features(CLIPModel):
    """As transformers was when torchmetrics 1.9 was written: features come as they are."""

    def get_image_features(self, *args, **named):
        return super().get_image_features(*args, **named).pooler_output

    def get_text_features(self, *args, **named):
        return super().get_text_features(*args, **named).pooler_output


def pictures(count=4, wide=40, high=40):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (high // 8, wide // 8, 3), np.uint8)).resize((wide, high), Image.Resampling.BICUBIC)
            for _ in range(count)]


TEXTS = ["a fox on the moon", "an owl, ink drawing", "a robot wearing a scarf", "a snail"]


@pytest.mark.slow
def test_it_agrees_with_torchmetrics(folders, judge):
    metric = pytest.importorskip("torchmetrics.multimodal.clip_score").CLIPScore
    ours = clip_score(torch.stack([judge.cosine([picture], [text])[0, 0] for picture, text in zip(pictures(), TEXTS, strict=True)]))
    assert ours.unique().numel() >= 3
    for picture, text, score in zip(pictures(), TEXTS, ours, strict=True):
        theirs = metric(lambda: (Features.from_pretrained(folders / "hf"), CLIPProcessor.from_pretrained(folders / "hf")))
        theirs.update([torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)], [text])
        assert float(score) == pytest.approx(float(theirs.compute()), abs=0.3)  # theirs resizes tensors, ours pictures


def test_on_pictures_that_need_no_resizing_it_agrees_to_the_fourth_digit(folders, judge):
    hf, words = CLIPModel.from_pretrained(folders / "hf"), clip_tokenizer.tokenizer()
    exact = pictures(4, 32, 32)
    pixels = torch.stack([(torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None])
                          / torch.tensor(STD)[:, None, None] for one in exact])
    read = words(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        theirs = hf(input_ids=read.input_ids, attention_mask=read.attention_mask, pixel_values=pixels)
    cosine = torch.nn.functional.normalize(theirs.image_embeds, dim=-1) @ torch.nn.functional.normalize(theirs.text_embeds, dim=-1).T
    assert judge.cosine(exact, TEXTS).numpy() == pytest.approx(cosine.numpy(), abs=2e-5)


def test_the_scales():
    cosine = torch.tensor([-0.2, 0.0, 0.31])
    assert clip_score(cosine).tolist() == pytest.approx([0.0, 0.0, 31.0])
    assert clip_score(cosine, "2.5").tolist() == pytest.approx([0.0, 0.0, 0.775])
    assert clip_score(cosine, "cos").tolist() == pytest.approx([-0.2, 0.0, 0.31])


def test_a_long_text_is_cut_and_keeps_its_end_token(judge):
    """torchmetrics dropped it once, and long texts scored wrong."""
    assert judge.cut(["a fox", LONG]) == [False, True]
    tokens = judge.tokenize([LONG])[0]
    assert tokens.shape == (77,) and tokens[-1] == 49407 and (tokens == 49407).sum() == 1
    same = judge.read([LONG, LONG + " and a whale"])
    assert torch.equal(same[0], same[1])  # what is beyond the end is not read
    edge = " ".join(["fox"] * 75)
    assert judge.cut([edge, edge + " fox"]) == [False, True]


def test_pockets_own_judge_counts_its_cut_texts_and_keeps_the_end_token():
    judge = Judge.open("pocket")
    assert judge.cut(["a fox in the snow", LONG]) == [False, True]
    end = judge.tokenize.tokenizer.eos_token_id
    assert judge.tokenize([LONG])[0, -1] == end
    assert judge.name.startswith("pocket ") and judge.folder is not None


def test_sides_are_squares_of_the_outer_parts():
    picture = Image.new("RGB", (100, 80), (255, 0, 0))
    picture.paste((0, 0, 255), (60, 0, 100, 80))
    left, right = sides(picture)
    assert left.size == right.size == (80, 80)
    assert left.getpixel((40, 40)) == (255, 0, 0) and right.getpixel((40, 40)) == (0, 0, 255)
    assert round(100 * OUTER) == 40


def test_doubled_asks_both_sides():
    """A judge that sees how red a picture is: red on both sides is twice, red in the middle or on one side is not."""

    class Red(Judge):
        def see(self, pictures, part=64):
            red = [np.asarray(one.convert("RGB"))[..., 0].mean() / 255 for one in pictures]
            return torch.tensor([[share, 1 - share] for share in red], dtype=torch.float32)

        def read(self, texts):
            return torch.tensor([[1.0, 0.0]] * len(texts))

    judge = Red(torch.nn.Linear(1, 1), None, None, {"red": Threshold(0.3, 1.0, 0.05)})
    row = {"both": [(0, 30), (70, 100)], "middle": [(42, 58)], "left": [(0, 40)]}
    made = []
    for spans in row.values():
        picture = Image.new("RGB", (100, 100))
        for start, stop in spans:
            picture.paste((255, 0, 0), (start, 0, stop, 100))
        made.append(picture)
    assert judge.doubled(made, ["red"])[:, 0].tolist() == [True, False, False]
