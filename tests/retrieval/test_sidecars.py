"""What other managers put beside a LoRA file, and what a card takes from it."""

import json
import os
import time
from itertools import count

import pytest

from retrieval import cards, headers, sidecars
from retrieval.cards import Trigger
from tests.hostile.values import BAD, ODD, ODDLY_TYPED, TEXTS
from tests.retrieval.files import A1111, CIVITAI, MANAGER, beside, lora


def notes(tmp_path, **contents):
    path = tmp_path / "owl.safetensors"
    return sidecars.read([beside(path, ending, content) for ending, content in contents.items()])


def test_civitai_info(tmp_path):
    said = notes(tmp_path, **{".civitai.info": CIVITAI})
    assert said.title == "Night Owls" and said.base == "Illustrious" and said.category == "character"
    assert said.triggers == ("hoot, red owl", "<s0><s1>"), "words that look like markup are words"
    assert said.description == "Owls at night. Second version" and said.tags == ("animal", "character")
    assert said.licence == "commercial use: Image, RentCivit; credit needed; derivatives allowed; derivatives under the same terms"
    assert said.sha256 == ("ab" * 32,) and said.remarks == ()


def test_lora_managers_metadata(tmp_path):
    said = notes(tmp_path, **{".metadata.json": MANAGER})
    assert said.title == "Owl by a friend" and said.base == "Pony" and said.weight == pytest.approx(0.7)
    assert said.tags == ("bird", "animal", "character") and said.triggers == ("hoot, red owl", "<s0><s1>")
    assert said.description == "Birds of prey good at 0.7" and said.sha256 == ("cd" * 32, "ab" * 32)


def test_a1111(tmp_path):
    said = notes(tmp_path, **{".json": A1111})
    assert said.triggers == ("an owl", "feathers") and said.weight == 0.65 and said.base == "SD1" and said.description == "mine n"
    assert notes(tmp_path, **{".json": A1111 | {"preferred weight": 0, "sd version": "Unknown"}}) == sidecars.Notes(
        triggers=("an owl", "feathers"), description="mine n"), "0 and Unknown are how it says nothing"


def test_the_users_own_note_comes_first_and_lists_are_joined(tmp_path):
    path = lora(tmp_path / "owl.safetensors", metadata={"trigger_words": "Owl, an owl", "ss_tag_frequency": json.dumps({"1_owl": {"owl": 3, "tree": 5}})})
    files = [beside(path, ".json", A1111), beside(path, ".metadata.json", MANAGER), beside(path, ".civitai.info", "{")]
    card = headers.describe(path, files)
    assert card.triggers == (Trigger("Owl", "header"), Trigger("an owl", "header"), Trigger("feathers", "sidecar"), Trigger("hoot, red owl", "sidecar"),
                             Trigger("<s0><s1>", "sidecar"), Trigger("tree", "training tags"))
    assert card.words_of("header", "sidecar") == ("Owl", "an owl", "feathers", "hoot, red owl", "<s0><s1>"), "no training tag is a trigger word unasked"
    assert card.base == "SD1" and card.weight == 0.65 and card.title == "Owl by a friend"
    (remark,) = card.remarks
    assert remark.startswith("owl.civitai.info is not readable as JSON") and not card.trouble
    assert card.words.splitlines()[:2] == ["Owl by a friend", "owl"] and "tree" in card.words


def test_training_tags_are_counted_over_folders_and_ordered(tmp_path):
    tags = {"img": {"10_owl": {"owl": 3, " night ": 4, "tree": 1}, "5_x": {"owl": 9, "": 5, "half": 1.5, "no": True, "less": -3, "big": 10**400 % 10**30}}}
    assert list(headers.training_tags({"ss_tag_frequency": json.dumps(tags)})) == ["owl", "night", "tree"]
    assert len(headers.describe(lora(tmp_path / "a.safetensors", metadata={"ss_tag_frequency": json.dumps(
        {"a": {f"tag {index}": index for index in range(1, 999)}})})).triggers) == headers.MAX_TRAINING_TAGS
    for text in ("", "[]", "{", "null", "[[[", '{"a": 1}', '{"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}'):
        assert list(headers.training_tags({"ss_tag_frequency": text})) in ([], ["a"])


@pytest.mark.parametrize(("markup", "text"), [
    ("plain", "plain"), ("a <b>b</b> c", "a b c"), ("<p>a</p><p>b</p>", "a b"), ("a<br/>b", "a b"), ("1 < 2 > 0", "1 < 2 > 0"), ("&lt;b&gt; &amp;", "<b> &"),
    ("<script>alert(1)</script>x", "x"), ("<STYLE>p</style>x", "x"), ("<script>never ends", ""), ("x<!-- no -->y", "xy"), ("<3 owls", "<3 owls"),
    ("<img src=x onerror=alert(1)>x", "x"), ("a<div>b</div>c", "a b c"),
])  # fmt: skip
def test_markup_is_stripped(markup, text):
    assert " ".join(sidecars.plain(markup).split()) == text


@pytest.mark.parametrize("piece", ["<", "<script>", "</script>", "<a", "&", "&amp", "<!--", "<p>", "< >", "<<>>"])
def test_markup_takes_linear_time(piece):
    begun = time.process_time()
    sidecars.plain(piece * (sidecars.MAX_MARKUP // len(piece)))
    assert time.process_time() - begun < 2


VALUES = [value.decode("utf-8", "replace") for name, value in (BAD | ODD | ODDLY_TYPED).items() if name != "million lists"] + list(map(json.dumps, TEXTS.values()))
SHORT = [value for value in VALUES if len(value) < 10_000]


@pytest.mark.parametrize(("ending", "document"), [(".civitai.info", CIVITAI), (".metadata.json", MANAGER), (".json", A1111)])
def test_whatever_stands_in_a_sidecar_the_file_has_a_card(ending, document, tmp_path):
    """Every value of every key replaced by every odd one, at each depth."""
    path, text, turn = lora(tmp_path / "owl.safetensors"), "", count()
    file = beside(path, ending, {})
    for key in document:
        deeper = [(key, inner) for inner in document[key]] if isinstance(document[key], dict) else []
        for where in [(key,), *deeper]:
            mark = json.loads(json.dumps(document))
            (mark if len(where) == 1 else mark[key])[where[-1]] = "MARK"
            text = json.dumps(mark)
            for value in VALUES if where == ("description",) else SHORT[next(turn) % 5 :: 5]:  # a part of all in each place is enough
                file.write_text(text.replace('"MARK"', value), "utf-8", "replace")
                said = sidecars.read([file])
                assert all(len(word) <= 200 and "\0" not in word for word in (said.title, said.base, said.licence, *said.tags))
                assert all(len(word) <= sidecars.MAX_DESCRIPTION for word in said.triggers) and len(said.description) <= sidecars.MAX_DESCRIPTION
                assert said.weight is None or 0 < abs(said.weight) <= sidecars.MAX_WEIGHT
                repr(said).encode()
    file.write_text(text.replace('"MARK"', '"\\ud800"'))
    card = headers.describe(path, [file])
    assert not card.trouble and cards.read(path, card.text()) == card


def test_no_path_in_a_sidecar_is_opened(tmp_path, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    path = lora(tmp_path / "lib" / "owl.safetensors")
    told = str(secret)
    file = beside(path, ".metadata.json", MANAGER | {"preview_url": told, "file_path": told, "civitai": {"images": [{"url": told}]}})
    opened, real = [], os.open
    monkeypatch.setattr("composition.untrusted.os.open", lambda name, *flags: opened.append(str(name)) or real(name, *flags))
    card = headers.describe(path, [file])
    assert set(opened) == {str(path), str(file)} and card.preview == "" and told not in card.text()


def test_the_names_of_sidecars():
    assert sidecars.names("owl")[:4] == ["owl.json", "owl.metadata.json", "owl.civitai.info", "owl.preview.png"]
    assert {"owl.png", "owl.jpg", "owl.jpeg", "owl.webp", "owl.preview.webp"} < set(sidecars.names("owl"))
