"""Weights, BREAK and long prompts: read as A1111 writes them, encoded by a formula written once more here on stock encoders."""

from dataclasses import replace

import pytest
import torch

from composition import Engine, Lora, Refused, Request, backbones, prompt_syntax, prompt_weights, prompts
from composition.backbones import chunks
from composition.prompt_weights import Prompt
from tests import toys
from tests.composition import laws

LONG = "the fox, " * 30 + "the owl on the moon"  # 95 tokens of the toys


@pytest.mark.parametrize(("written", "text", "weights"), [
    ("a fox", "a fox", {}),
    ("a (fox:1.4) in", "a fox in", {"fox": 1.4}),
    ("((fox)) [owl]", "fox owl", {"fox": 1.1**2, "owl": 1 / 1.1}),
    ("(a (b:2):0.5)", "a b", {"a ": 0.5}),
    (r"miku \(vocaloid\), :)", "miku (vocaloid), :)", {}),
    (r"(miku \(vocaloid\):1.2)", "miku (vocaloid)", {"miku (vocaloid)": 1.2}),
    ("(a:b:.5)", "a:b", {"a:b": 0.5}),
    ("a (fox", "a (fox", {}),
    ("a fox:1.2)", "a fox:1.2)", {}),
    ("((fox)", "(fox", {"fox": 1.1}),
    ("() (:1.2)", "() (:1.2)", {}),
    ("[a:b:0.5] [a|b]", "[a:b:0.5] [a|b]", {}),
    ("(x:0) (y:-1)", "x y", {"x": 0.0, "y": -1.0}),
    (r"C:\foxes\new", r"C:\foxes\new", {}),
])  # fmt: skip
def test_weights_are_read_as_they_are_written(written, text, weights):
    prompt = prompt_weights.read(written)
    assert prompt.text == text == prompt_weights.plain(written)
    assert {text[start:end]: weight for start, end, weight in prompt.weights} == pytest.approx(weights)
    assert prompt_weights.read(prompt_weights.escaped(written)) == Prompt(written), "escaped, it is itself"
    assert prompt_weights.marked(text, prompt.marks()) == prompt


def test_break_begins_a_chunk():
    assert prompt_weights.read("a fox BREAK the (owl:1.2)") == Prompt("a fox the owl", ((10, 13, 1.2),), (6,))
    assert prompt_weights.read("BREAK a BREAK BREAK b BREAK").breaks == (2,)
    assert prompt_weights.read("a BREAKFAST, break") == Prompt("a BREAKFAST, break")


@pytest.mark.parametrize("prompt", ["(fox:11)", "(" * 30 + "fox" + ")" * 30, "(fox:-10.5)", "(a (b:1.5):8)"])
def test_a_weight_out_of_range_is_refused(prompt, engines):
    with pytest.raises(Refused, match="weights from -10 to 10"):
        engines["sd"].settle(Request(prompt=prompt))


# encoding ----------------------------------------------------------------------------------------------------------------


def clip(pipe, name, words):
    """(tokens, pooled) of these words by one encoder of a pipeline: start, words, end, padding, as CLIP has them."""
    encoder, tokenizer = getattr(pipe, name), getattr(pipe, name.replace("text_encoder", "tokenizer"))
    ids = [i for word in words for i in tokenizer(word, add_special_tokens=False).input_ids]
    assert len(ids) <= 75
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (77 - len(ids))
    out = encoder(torch.tensor([ids]), output_hidden_states=True)
    last = isinstance(pipe, toys.StableDiffusionPipeline)
    return (out.last_hidden_state if last else out.hidden_states[-2])[0], None if last else out[0][0] if out[0].ndim == 2 else None


def tokens_of(pipe, words, weights=None):
    """The same of all CLIP encoders side by side, each token moved from the empty prompt's by its weight."""
    names = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    seen, empty = (torch.cat([clip(pipe, name, said)[0] for name in names], -1) for said in (words, []))
    weight = torch.ones(77, 1, dtype=torch.float64)
    tokenizer, at = pipe.tokenizer, 1
    for word, value in zip(words, weights or [1.0] * len(words), strict=True):
        count = len(tokenizer(word, add_special_tokens=False).input_ids)
        weight[at : at + count] = value
        at += count
    return empty + weight * (seen - empty)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@torch.no_grad()
def test_weights_of_clip_move_tokens_from_the_empty_prompt(family, engines):
    backbone = engines[family].backbone
    cond = backbone.encode([prompt_weights.read("the (fox on:1.5) (the:0.3) owl")], [prompt_weights.read("(moon:2)")])
    expected = tokens_of(backbone.pipeline, ["the", "fox", "on", "the", "owl"], [1, 1.5, 1.5, 0.3, 1])
    laws.same(cond.values["text"][1, 0], expected, 1e-12)
    laws.same(cond.values["text"][0, 0], tokens_of(backbone.pipeline, ["moon"], [2]), 1e-12)
    if family == "sdxl":
        laws.same(cond.values["pooled"][1, 0], clip(backbone.pipeline, "text_encoder_2", "the fox on the owl".split())[1], 1e-12)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@torch.no_grad()
def test_a_long_prompt_is_read_in_chunks_of_75(family, engines):
    backbone, pipe = engines[family].backbone, engines[family].backbone.pipeline
    cond = backbone.encode([Prompt(LONG)], [Prompt("the moon")])
    first = ["the", "fox", ","] * 25
    assert len(pipe.tokenizer(" ".join(first), add_special_tokens=False).input_ids) == 75
    rest = [*["the", "fox", ","] * 5, *"the owl on the moon".split()]
    laws.same(cond.values["text"][1, 0], torch.cat([tokens_of(pipe, first), tokens_of(pipe, rest)]), 1e-12)
    laws.same(cond.values["text"][0, 0], torch.cat([tokens_of(pipe, ["the", "moon"]), tokens_of(pipe, [])]), 1e-12)
    if family == "sdxl":
        laws.same(cond.values["pooled"][1, 0], clip(pipe, "text_encoder_2", first)[1], 1e-12)
        zeroed = backbone.encode([Prompt(LONG)], [Prompt("")])
        assert not zeroed.values["text"][0].any() and not zeroed.values["pooled"][0].any(), "as its authors trained it"


@torch.no_grad()
def test_break_ends_a_chunk_early(engines):
    backbone = engines["sd"].backbone
    cond = backbone.encode([prompt_weights.read("the fox BREAK the (owl:1.2)")], None)
    laws.same(cond.values["text"][0, 0], torch.cat([tokens_of(backbone.pipeline, ["the", "fox"]), tokens_of(backbone.pipeline, ["the", "owl"], [1, 1.2])]), 1e-12)


@torch.no_grad()
def test_sd3_reads_chunks_with_clip_and_the_whole_with_t5(engines):
    backbone, pipe = engines["sd3"].backbone, engines["sd3"].backbone.pipeline
    cond = backbone.encode([prompt_weights.read("the fox BREAK (owl:1.5)")], None)
    wide = torch.nn.functional.pad(torch.cat([tokens_of(pipe, ["the", "fox"]), tokens_of(pipe, ["owl"], [1.5])]), (0, 48 - 40))
    seen, empty = (t5(pipe.text_encoder_3, pipe.tokenizer_3, text, 256) for text in ("the fox owl", ""))
    seen[2] = empty[2] + 1.5 * (seen[2] - empty[2])
    laws.same(cond.values["text"][0, 0], torch.cat([wide, seen]), 1e-12)
    laws.same(cond.values["pooled"][0, 0], torch.cat([clip(pipe, name, ["the", "fox"])[1] for name in ("text_encoder", "text_encoder_2")]), 1e-12)


@torch.no_grad()
def test_flux_weighs_the_tokens_of_t5_alone(engines):
    backbone, pipe = engines["flux"].backbone, engines["flux"].backbone.pipeline
    plain, cond = (backbone.encode([prompt_weights.read(text)], None).values for text in ("the fox and", "the (fox:1.5) and"))
    length = plain["text"].shape[2]
    seen, empty = (t5(pipe.text_encoder_2, pipe.tokenizer_2, text, length) for text in ("the fox and", ""))
    laws.same(plain["text"][0, 0], seen, 1e-12)
    seen[1] = empty[1] + 1.5 * (seen[1] - empty[1])
    laws.same(cond["text"][0, 0], seen, 1e-12)
    assert torch.equal(cond["pooled"], plain["pooled"])


def t5(encoder, tokenizer, text, length):
    """T5's tokens of words that are a token each, padded."""
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, 1]
    return encoder(torch.tensor([ids + [0] * (length - len(ids))]))[0][0]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@torch.no_grad()
def test_a_prompt_without_syntax_is_encoded_as_the_stock_pipeline_does(family, engines):
    backbone = engines[family].backbone
    for text in ("the fox and the owl", "a fox: 50% off, 3:4", ""):
        ours, stock = (backbone.encode([each], [other]) for each, other in ((prompt_weights.read(text), Prompt("the moon")), (text, "the moon")))
        assert all(torch.equal(ours.values[name], stock.values[name]) for name in stock.values)


# where the words are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("written", ["the (fox:1.4) and the owl", LONG, "a fox BREAK the [owl] on (the moon:0.7)", "the fox " * 40 + "(owl:1.2)"])
def test_every_token_knows_its_letters(family, written, engines):
    backbone, prompt = engines[family].backbone, prompt_weights.read(written)
    found = backbone.offsets(prompt)
    read = backbone.encode([prompt], None).values["text"].shape[2]
    assert len(found) <= read and (family == "flux" or read == 77 * backbone.chunks(prompt) + 256 * (family == "sd3"))
    tokenizer = backbone.pipeline.tokenizer if family != "flux" else backbone.pipeline.tokenizer_2
    if family in ("sd", "sdxl"):
        said = [prompt.text[a:b] for a, b in found if a < b]
        assert "".join(said) == "".join(prompt.text.split()), "every letter once, in order"
        owl = prompts.tokens(prompt.text, (prompt.text.index("owl"), prompt.text.index("owl") + 3), found)
        assert len(owl) == 1
        part = chunks.chunks(prompt, tokenizer)[0][owl[0] // 77]
        assert tokenizer(part.text, padding="max_length", max_length=77, truncation=True).input_ids[owl[0] % 77] == tokenizer("owl").input_ids[1]


def test_a_word_longer_than_a_chunk_is_split(engines):
    backbone = engines["sd"].backbone
    text = "q" * 200 + " fox"
    parts, rest = chunks.chunks(Prompt(text), backbone.pipeline.tokenizer)
    assert "".join(part.text for part in parts) == text and not rest
    assert all(len(backbone.pipeline.tokenizer(part.text).input_ids) <= 77 for part in parts)


def test_chunks_are_bounded_and_the_rest_is_noted(engines):
    backbone = engines["sd"].backbone
    text = "the fox, " * 1000
    assert backbone.chunks(Prompt(text)) == chunks.MOST
    assert backbone.truncated(Prompt(text)) == text[25 * chunks.MOST * len("the fox, ") :]
    assert not backbone.truncated(Prompt(LONG)) and backbone.truncated(LONG)


def test_the_words_of_concepts_keep_their_weights():
    loras = {"fox": Lora("fox", binds="the red fox"), "owl": Lora("owl", binds="an owl")}
    scene = prompts.scene(prompt_weights.read("the red (fox:1.4) BREAK and [an owl]"), loras, {}, {"fox": ("red",), "owl": ("snowy owl",)})
    base, fox, owl = scene.prompts
    assert scene.texts == ["the fox and an owl", "the red fox and an owl", "the fox and an snowy owl"]
    assert fox.weights[0] == (8, 11, 1.4) and fox.breaks == (12,)
    assert base.weights[0] == (0, 7, 1.4) and base.breaks == (8,), "words that were rewritten weigh as the last of them"
    assert [owl.text[slice(*span[2])] for span in scene.spans] == ["the fox", "an snowy owl"]


# requests -------------------------------------------------------------------------------------------------------------------


def test_an_old_request_means_what_it_meant(engines):
    """Literal brackets and the end that was not seen: a picture of schema 1 is made again as it was."""
    for text in ("the (fox:1.4) BREAK [owl]", LONG):
        old = Request.read(f'{{"prompt": "{text}", "negative": "(moon)", "steps": 2, "size": [16, 16], "seed": 3, "schema_version": 1}}')
        assert prompt_syntax.prompts_of(old) == (text, "(moon)") and Request.read(old.json()).schema_version == 1
        edited = prompt_syntax.today(old)
        assert edited.schema_version == prompt_syntax.SCHEMA_VERSION and prompt_syntax.words(edited) == text
        was, new = laws.latents(engines["sd"], old), laws.latents(engines["sd"], replace(old, schema_version=2))
        laws.differ(was, new)
    bracketed = replace(old, prompt="the (fox:1.4) [owl]")
    laws.same(laws.latents(engines["sd"], bracketed), laws.latents(engines["sd"], prompt_syntax.today(bracketed)), 1e-12)


def test_trigger_words_are_put_in_as_words():
    asked = Request(prompt="a (fox:1.2)", loras=[Lora("miku", triggers=("miku (vocaloid)",)), Lora("fox", triggers=("a fox",))])
    settled, added = prompts.with_triggers(asked, lambda source: pytest.fail("not read"))
    assert added == ["miku (vocaloid)"] and settled.prompt == r"a (fox:1.2), miku \(vocaloid\)"
    assert prompts.with_triggers(settled, lambda source: pytest.fail("not read"))[1] == []


# Methods that read the prompt's words, or several prompts, on the families whose prompts lie apart from the picture and in one attention with it.
READERS = [*((method, "sd") for method in ("clora", "clora-fast", "regions", "cmlora", "composite", "merge", "ssr", "w-composite", "w-switch")),
           *((method, "flux") for method in ("clora-fast", "regions"))]  # fmt: skip


@pytest.mark.parametrize(("method", "family"), READERS)
def test_methods_read_weighted_and_long_prompts(method, family, engines, lora_files):
    """A weight of 1 changes nothing, to the bit; another does; a prompt of two chunks is drawn, the concepts' words in both."""
    engine, loras = engines[family], laws.loras_of(lora_files[family])
    short = {"steps": 2}
    plain = laws.latents(engine, laws.request(method, *loras, **short))
    one = laws.latents(engine, laws.request(method, *loras, prompt="(the fox:1.0) and the (owl:1) on the moon", **short))
    assert torch.equal(plain, one)
    weighted = laws.latents(engine, laws.request(method, *loras, prompt="the (fox:1.8) and (the owl:0.4) on the moon", negative="(fox)", **short))
    laws.differ(weighted, plain)
    words = "the fox and " if family == "flux" else "the fox and " + "moonlit, " * 9  # T5's toy has 24 tokens
    long = laws.latents(engine, laws.request(method, *loras[:2], prompt=f"{words}the (owl:1.3) on the hill", negative="", **short))
    assert torch.isfinite(long).all()
    if family == "sd":
        assert engine.backbone.chunks(prompt_weights.read(f"{words}the (owl:1.3) on the hill")) == 2


def test_a_long_prompt_is_seen_to_its_end():
    engine = Engine(backbones.of(toys.sd(), "sd"), "toy")
    asked = Request(prompt=LONG, steps=1, size=(16, 16), guidance=4)
    result, other = (engine.run(replace(asked, prompt=text)) for text in (LONG, LONG.replace("moon", "hill")))
    assert "prompt cut" not in result.notes and result.images[0].tobytes() != other.images[0].tobytes()
