"""Words are spelled alike on cards and in queries; phrases are literal; only unknown words are replaced by close ones."""

import re
import time

import pytest

from composition import Refused
from retrieval.words import MAX_CLOSE, Query, Vocabulary, clean, fold, parse, tokens


@pytest.mark.parametrize(("text", "words"), [
    ("GhibliStyle_v2.5", ["ghiblistyle", "ghibli", "style", "v2", "v", "2", "5"]),
    ("SDXLTurbo", ["sdxlturbo", "sdxl", "turbo"]),
    ("neon-punk/city", ["neon", "punk", "city"]),
    ("Pokémon POKE\u0301MON", ["pokemon", "pokemon"]),
    ("dragons glass glasses cities bus", ["dragon", "glass", "glass", "city", "bus"]),
    ("龙城lora", ["龙", "城", "龙城", "lora"]),
    ("サイバー", ["サ", "イ", "バ", "ー", "サイ", "イバ", "バー"]),
    ("한국", ["한국"]),
    ("ﬁre Ⅳ", ["fire", "iv"]),
    ("x" * 100, ["x" * 40]),
    ("\udcff _ -", []),
])
def test_tokens(text, words):
    assert tokens(text) == words


def test_tokens_have_no_white_space_and_spelling_them_again_changes_nothing():
    for text in ("Straße İstanbul ΣΊΣΥΦΟΣ", "a\u00a0b\u2003c", "e\u0301\u0301", "ᾳ ŉ ǰ", "ｆｕｌｌ　ｗｉｄｔｈ", "가각힣", "ไทย"):
        for word in tokens(text):
            assert re.fullmatch(r"\S+", word) and word in tokens(word)


def test_fold_is_literal_but_for_case_composition_and_white_space():
    assert fold("Neon\n  CITY Cafe\u0301") == "neon city café"
    assert fold("c++ (v1.0)") == "c++ (v1.0)"


def test_clean_leaves_text_alone_and_takes_halves_of_letters_out():
    assert clean("ünï☃") == "ünï☃"
    clean("a\udcffb").encode()


@pytest.mark.parametrize(("text", "query"), [
    ('a dragon in a "Neon  City" at night', Query(("neon city",), ("neon", "city", "dragon", "night"))),
    ("“Neon City”", Query(("neon city",), ("neon", "city"))),
    ('not "closed', Query((), ("not", "closed"))),
    ('"" " "', Query((), ())),
    ("the", Query((), ("the",))),
    ('the "++"', Query(("++",), ("the",))),
    ("owl owl Owls", Query((), ("owl",))),
    ("", Query((), ())),
])
def test_parse(text, query):
    assert parse(text) == query
    assert bool(query) == bool(query.phrases or query.terms)


def test_a_very_long_query_is_refused():
    with pytest.raises(Refused, match="10,001 letters"):
        parse("a" * 10_001)


def test_unknown_words_stand_for_those_they_begin_or_mistype():
    known = sorted(["dragon", "dragonfly", "neon", "pokemon", "cake", "fake", "ghibli"])
    words = Vocabulary(known, [{"dragon": 5, "dragonfly": 9}.get(word, 1) for word in known])
    assert words.close(["dragon", "pokmon", "drag", "lake", "gihbli", "xyz", "ne"]) == ("dragon", "pokemon", "dragonfly", "ghibli")
    assert words.close(["drag"]) == ("dragonfly", "dragon")  # the commoner first
    assert Vocabulary([], []).close(["dragon"]) == ()


def test_an_unknown_word_stands_for_few_words_quickly():
    known = sorted(f"style{number:05d}" for number in range(50_000))
    words = Vocabulary(known, [1] * len(known))
    assert len(words.close(["sty"])) == MAX_CLOSE
    begun = time.perf_counter()
    words.close([f"unknown{'x' * number}" for number in range(33)])
    assert time.perf_counter() - begun < 2
