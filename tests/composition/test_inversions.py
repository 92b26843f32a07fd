"""Textual inversions: a file with the vectors of words that the model knows draws what those words draw, and nothing of it stays."""

import pytest
import torch
from safetensors.torch import save_file

from composition import Embedding, Engine, Lora, Refused, Request, backbones, inversions
from tests import toys
from tests.composition import laws

PLAIN = {"steps": 2, "negative": "the moon"}


def known(pipe, *words):
    """The model's own vectors of words that are a token each, for every text encoder."""
    names = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    return {name: getattr(pipe, name).get_input_embeddings().weight[[pipe.tokenizer(word).input_ids[1] for word in words]].detach().clone()
            for name in names}


def written(folder, pipe, *words, name="sks", key="emb_params"):
    vectors, file = known(pipe, *words), folder / f"{name}.safetensors"
    both = {"clip_l": vectors["text_encoder"], "clip_g": vectors["text_encoder_2"]} if len(vectors) > 1 else {key: vectors["text_encoder"]}
    save_file({key: value.contiguous() for key, value in both.items()}, file)
    return file


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_vectors_of_known_words_draw_what_the_words_draw(family, engines, tmp_path):
    engine = engines[family]
    file = str(written(tmp_path, engine.backbone.pipeline, "fox", "owl"))
    expected = laws.latents(engine, laws.request("merge", prompt="the fox owl on the moon", **PLAIN))
    asked = laws.request("merge", prompt="the SKS on the moon", embeddings=[Embedding(file)], **PLAIN)
    engine.run(asked)  # transformers hooks a text encoder's layers for good when it is first asked for their outputs
    before = laws.fingerprint(engine)
    laws.same(laws.latents(engine, asked), expected, 1e-12)
    assert laws.fingerprint(engine) == before
    laws.differ(laws.latents(engine, laws.request("merge", prompt="the sks on the moon", **PLAIN)), expected)  # the next picture reads a word again
    weighted = [laws.latents(engine, laws.request("merge", prompt=text, embeddings=[Embedding(file, "cat")], **PLAIN))
                for text in ("the (cat:1.3) on the moon", "the (fox owl:1.3) on the moon")]
    laws.same(*weighted, 1e-12)


def test_a_prompt_names_them_by_file(engines, tmp_path):
    backbone = engines["sd"].backbone
    written(tmp_path, backbone.pipeline, "owl", name="bad-hands")
    engine = Engine(backbone, "toy", folders=[tmp_path])
    asked = laws.request("merge", prompt="(embedding:bad-hands:1.0), the moon", **(PLAIN | {"negative": "a embedding:bad-hands."}))
    settled, _ = engine.settle(asked)
    assert settled.embeddings == (Embedding("bad-hands", "embedding:bad-hands"),) and engine.settle(settled)[0] == settled
    assert Request.read(settled.json()) == settled and "embeddings" not in Request(prompt="a").json()
    laws.same(laws.latents(engine, asked), laws.latents(engine, laws.request("merge", prompt="owl, the moon", **(PLAIN | {"negative": "a owl."}))), 1e-12)
    note = engine.run(asked).notes["embeddings"]["embedding:bad-hands"]
    assert note["vectors"] == 1 and len(note["sha256"]) == 64
    with pytest.raises(Refused, match="textual inversion 'good-hands'"):
        engine.settle(laws.request("merge", prompt="embedding:good-hands"))


def test_the_word_of_the_file_stands_for_it(engines, tmp_path):
    engine = engines["sd"]
    file = str(written(tmp_path, engine.backbone.pipeline, "owl", key="<cat-toy>"))
    assert engine.settle(Request(prompt="a", embeddings=[Embedding(file)]))[0].embeddings[0].word == "<cat-toy>"
    result = Engine(backbones.of(toys.sd(), "sd"), "toy").run(Request(prompt="a fox", embeddings=[Embedding(file)], steps=1, size=(16, 16)))
    assert result.notes["embeddings not named"] == ["<cat-toy>"]


@pytest.mark.parametrize("method", ["clora", "clora-fast", "regions"])
def test_concepts_may_be_inversions(method, engines, lora_files, tmp_path):
    engine, loras = engines["sd"], laws.loras_of(lora_files["sd"])
    file = str(written(tmp_path, engine.backbone.pipeline, "owl"))
    named = [Lora(lora.source, weight=lora.weight, binds=lora.binds.replace("owl", "sks")) for lora in loras]
    expected = laws.latents(engine, laws.request(method, *loras, steps=2))
    drawn = laws.latents(engine, laws.request(method, *named, prompt="the fox and the sks on the moon", embeddings=[Embedding(file)], steps=2))
    laws.same(drawn, expected, 1e-9)


def test_vectors_that_do_not_fit_into_a_chunk_begin_the_next(engines, tmp_path):
    backbone = engines["sd"].backbone
    file = written(tmp_path, backbone.pipeline, *["fox"] * 70)
    opened = {"sks": inversions.read(file)}
    prompt = inversions.named(inversions.Prompt("the owl and the moon in the sks on the moon"), opened)
    found = backbone.offsets(prompt)
    places = [index for index, (a, b) in enumerate(found) if a < b and prompt.text[a:b] != "" and prompt.words[0].start <= a < prompt.words[0].end]
    assert backbone.chunks(prompt) == 2 and places == list(range(78, 148)), "all of them in the second chunk"
    with torch.no_grad():
        cond = backbone.encode([prompt], None, vectors=inversions.vectors(opened)).values["text"]
        words = backbone.encode([inversions.Prompt("the owl and the moon in the " + "fox " * 70 + "on the moon", breaks=(28,))], None).values["text"]
    laws.same(cond, words, 1e-12)


@pytest.mark.parametrize(("tensors", "said"), [
    ({"emb_params": torch.zeros(2, 768)}, "768 numbers .* made for Stable Diffusion 1.x"),
    ({"clip_l": torch.zeros(2, 24), "clip_g": torch.zeros(2, 40)}, "which this model lacks: it was made for SDXL"),
    ({"clip_l": torch.zeros(2, 24), "clip_g": torch.zeros(3, 40)}, "2 and 3 vectors"),
    ({"emb_params": torch.zeros(76, 24)}, "at most 75"),
    ({"emb_params": torch.full((1, 24), torch.nan)}, "NaN"),
    ({"emb_params": torch.zeros(1, 2, 24)}, "no vectors"),
    ({"a": torch.zeros(1, 24), "b": torch.zeros(1, 24)}, "no textual inversion"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(tensors, said, engines, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(Refused, match=said):
        engines["sd"].run(Request(prompt="x", embeddings=[Embedding(str(tmp_path / "x.safetensors"))], steps=1))


def test_other_refusals(engines, tmp_path):
    file = str(written(tmp_path, engines["sd"].backbone.pipeline, "owl"))
    (tmp_path / "x.pt").write_bytes(b"\x80\x02")
    for family, asked, said in (
        ("sd", [Embedding(str(tmp_path / "x.pt"))], "pickle file.*--unsafe-pickle"), ("sdxl", [Embedding(file)], "text_encoder_2"),
        ("flux", [Embedding(file)], "Stable Diffusion 1.x, 2.x and SDXL"), ("sd", [Embedding(file, "a"), Embedding(file, "A")], "the same word"),
        ("sd", [Embedding(str(tmp_path / "none.safetensors"))], "textual inversion"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=said):
            engines[family].run(Request(prompt="a", embeddings=asked, steps=1))
