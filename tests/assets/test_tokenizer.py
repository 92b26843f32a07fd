"""The small tokenizer spells any word, gives it back, and pads as the stock pipeline expects."""

import json

import pytest
from transformers import CLIPTokenizer

from assets.recipe.tokenizer import LENGTH, build, corpus, ids


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    art = tmp_path_factory.mktemp("art")
    (art / "emojibase-data/en").mkdir(parents=True)
    (art / "emojibase-data/en/data.json").write_text(json.dumps([{"label": "fox face", "tags": ["animal", "fox"]}]))
    folder = tmp_path_factory.mktemp("tokenizer")
    build(corpus(art)).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["a fox in the snow", "zqxv", "straße", "日本 owl", "a 🦊 b"])
def test_any_word_is_spelled_and_comes_back(words, text):
    tokens = words(text, add_special_tokens=False).input_ids
    assert words.eos_token_id not in tokens
    assert words.decode(tokens).strip() == text


def test_the_world_is_spelled_in_whole_words(words):
    assert len(words("an octopus and a raccoon", add_special_tokens=False).input_ids) == 5


def test_padding_is_the_end_token(words):
    row = ids(words, ["a fox"])[0].tolist()
    assert len(row) == LENGTH and row[0] == words.bos_token_id
    assert set(row[4:]) == {words.eos_token_id} and words.pad_token_id == words.eos_token_id
    assert words.model_max_length == LENGTH


def test_the_same_corpus_is_the_same_tokenizer(words):
    again = build(["a fox in the snow"] * 5)
    assert again.get_vocab() == build(["a fox in the snow"] * 5).get_vocab()
