"""Which words a LoRA belongs to, and the prompts made from that; token positions by every tokenizer's own offsets."""

import pytest

from composition import Lora, Receipt, Refused, Request, prompts


def taken(prompt, *loras, triggers=None, categories=None):
    names = {lora.name: lora for lora in loras}
    return prompts.scene(prompt, names, categories or {}, triggers or {})


def words(scene):
    """[concept][prompt] the words themselves."""
    return [[text[a:b] for text, (a, b) in zip(scene.prompts, spans, strict=True)] for spans in scene.spans]


def test_found_from_the_trigger():
    scene = taken("a Raccoon and an owl, ink drawing", Lora("raccoon"), Lora("owl"), Lora("ink"),
                  triggers={"raccoon": ("raccoon",), "owl": ("barn owl", "owl"), "ink": ("ink drawing",)}, categories={"ink": "style"})
    assert scene.concepts == ("raccoon", "owl") and scene.everywhere == ("ink",)
    assert set(scene.prompts) == {"a Raccoon and an owl, ink drawing"}  # no other word would be left
    assert words(scene) == [["Raccoon"] * 3, ["owl"] * 3]


def test_the_trigger_stands_in_its_own_prompt_alone():
    scene = taken("a sks dog and a cat on a sofa", Lora("dog"), Lora("cat", binds="a cat"), triggers={"dog": ("sks",), "cat": ("xyz cat",)})
    # "sks" alone is the dog's words: without it nothing would be left of them
    assert scene.prompts == ("a sks dog and a cat on a sofa",) * 2 + ("a sks dog and a xyz cat on a sofa",)
    scene = taken("a sks dog and a cat", Lora("dog", binds="a sks dog"), Lora("cat", binds="a cat"), triggers={"dog": ("sks",), "cat": ("tom",)})
    assert scene.prompts == ("a dog and a cat", "a sks dog and a cat", "a dog and a tom cat")
    assert words(scene) == [["a dog", "a sks dog", "a dog"], ["a cat", "a cat", "a tom cat"]]


def test_bound_words_without_a_trigger_stay_as_they_are():
    scene = taken("the old fox by the well", Lora("anything", binds="the  old fox"))
    assert scene.prompts == ("the old fox by the well",) * 2 and words(scene) == [["the old fox"] * 2]


def test_a_place_with_a_binding_is_a_concept_and_without_it_is_everywhere():
    place = {"moon": "place"}
    assert taken("a fox on the moon", Lora("moon"), triggers={"moon": ("on the moon",)}, categories=place).everywhere == ("moon",)
    assert taken("a fox on the moon", Lora("moon", binds="the moon"), categories=place).concepts == ("moon",)


@pytest.mark.parametrize(("prompt", "words", "said"), [
    ("a bowl", "owl", False), ("an owl", "owl", True), ("An OWL, flying", "owl", True), ("owls", "owl", False), ("owl's nest", "owl", True),
    ("snow-owl", "owl", True), ("(owl:1.2)", "owl", True), ("owl_2", "owl", False), ("a pink drawing", "ink drawing", False),
    ("an ink  drawing", "ink drawing", True), ("an ink, drawing", "ink drawing", False), ("owl\nand fox", "owl and", True),
    ("c++ code", "c++", True), ("<s1><s2> cat", "<s1><s2>", True), ("ärger", "rger", False), ("cafe\u0301", "caf\u00e9", True),
    ("caf\u00e9", "cafe\u0301", True), ("cafe\u0301", "cafe", False), ("雪中的狐狸", "狐狸", True), ("キツネの絵", "キツネ", True),
    ("여우가 있다", "여우", True), ("a.c", "abc", False), ("abc", "a.c", False), ("owl", "", False), ("owl", "  ", False), ("", "owl", False),
])  # fmt: skip
def test_whole_words_are_said(prompt, words, said):
    assert prompts.says(prompt, words) is said
    assert prompts.lacks(prompt, (words,)) is not said
    assert not prompts.lacks(prompt, ()) and not prompts.lacks(f"{prompt} zebra", (words, "zebra"))


def test_missing_trigger_words_are_put_in():
    words = {"owl": ("owl",), "ink": ("ink drawing",), "fox": ("vulpes",)}

    def inspect(source):
        return Receipt(name=source, path="", sha256="", tensor_sha256="", family="sd", layout="kohya", tensors=1, applied=1,
                       triggers=words.get(source, ()))

    request = Request(prompt="a pink drawing of a bowl", loras=[Lora("owl"), Lora("ink"), Lora("fox", triggers=("bowl",)), Lora("mute")])
    made, added = prompts.with_triggers(request, inspect)
    assert (made.prompt, added) == ("a pink drawing of a bowl, owl, ink drawing", ["owl", "ink drawing"])
    assert prompts.with_triggers(made, inspect) == (made, [])


@pytest.mark.parametrize("prompt, lora, triggers, said", [
    ("a fox", Lora("owl"), ("owl",), "none of LoRA owl's trigger words.*owl"),
    ("a fox", Lora("owl"), (), "no trigger words"),
    ("a fox", Lora("owl", binds="an owl"), (), "which the prompt does not contain"),
    ("a fox", Lora("owl", binds=""), (), "which the prompt does not contain"),
    ("an owl and an owl", Lora("owl"), ("owl",), "2 times"),
    ("owls", Lora("owl"), ("owl",), "none of LoRA owl's trigger words"),
])  # fmt: skip
def test_refused(prompt, lora, triggers, said):
    with pytest.raises(Refused, match=said):
        taken(prompt, lora, triggers={"owl": triggers})


def test_words_that_overlap_are_refused():
    with pytest.raises(Refused, match="overlap"):
        taken("a fox in a scarf", Lora("fox", binds="a fox in a scarf"), Lora("scarf"), triggers={"scarf": ("scarf",)})


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_token_positions(family, engines):
    """The tokens of the words, counted with the start of text, articles left out; whole words in many pieces."""
    backbone = engines[family].backbone
    text = "the fox and zebra owl"
    offsets = backbone.offsets(text)
    ids = backbone.pipeline.tokenizer(text).input_ids
    assert len(offsets) == len(ids)
    pieces = backbone.pipeline.tokenizer.convert_ids_to_tokens(ids)
    found = prompts.tokens(text, (0, 7), offsets)
    assert [pieces[i] for i in found] == ["fox</w>"]
    found = prompts.tokens(text, (12, 21), offsets)
    assert "".join(pieces[i] for i in found).replace("</w>", " ").strip() == "zebra owl" and len(found) > 2
    assert prompts.tokens(text, (0, 3), offsets) == (1,)  # an article alone is what there is


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_words_in_the_part_that_was_cut_are_refused(family, engines):
    backbone = engines[family].backbone
    text = "fox " * 90 + "owl"
    assert backbone.truncated(text)
    offsets = backbone.offsets(text)
    assert len(offsets) == 77
    with pytest.raises(Refused, match="end of the prompt"):
        prompts.tokens(text, (len(text) - 3, len(text)), offsets, cut=True)
    assert prompts.tokens(text, (0, 3), offsets, cut=True) == (1,)


@pytest.mark.parametrize(("caption", "category", "captioned"), [
    ("a bowl on a table", "character", "owl, a bowl on a table"), ("an Owl on a table", "character", "an Owl on a table"),
    ("a bowl on a table.", "style", "a bowl on a table, owl"), ("night owls", "character", "owl, night owls"),
])
def test_captions_that_lack_the_trigger_get_it(caption, category, captioned):
    """Training counts a trigger as said by the same rule."""
    from composition.training import captions

    assert captions.with_trigger(caption, "owl", category) == captioned
    assert bool(captions.added({"1.png": caption}, "owl", category)) == (caption != captioned)


def test_a_scaled_lora():
    lora = Lora("owl", weight=0.8, text_weight=0.5, start=0.2)
    assert lora.scaled(1.1) == Lora("owl", weight=0.88, text_weight=0.55, start=0.2) and lora.scaled(1.0) is lora
    assert Lora("owl").scaled(0.5) == Lora("owl", weight=0.5)
