"""Other tools' prompt syntax: tags become LoRAs, the rest is found and said, in linear time."""

import time
from contextlib import suppress
from pathlib import Path

import pytest

from composition import Lora, Refused, Request, prompt_weights
from composition import prompt_syntax as syntax

FILES = {name: Path(f"/loras/{name}.safetensors") for name in ("raccoon", "owl", "styles/ink")}


def find(source: str) -> Path:
    if source not in FILES:
        raise Refused(f"no LoRA is named {source!r}")
    return FILES[source]


@pytest.mark.parametrize(("prompt", "left", "loras"), [
    ("a raccoon <lora:raccoon:0.8>", "a raccoon", [Lora("raccoon", weight=0.8)]),
    ("<lora:owl> an owl", "an owl", [Lora("owl")]),
    ("an owl <LORA:owl:.5>, at night", "an owl, at night", [Lora("owl", weight=0.5)]),
    ("an owl <lyco:owl:1>", "an owl", [Lora("owl")]),
    ("a <lora:raccoon:0.2:0.6> b <lora:styles/ink:-1>", "a b", [Lora("raccoon", weight=0.6, text_weight=0.2), Lora("styles/ink", weight=-1)]),
    ("a <lora: owl : 0.5 >", "a", [Lora("owl", weight=0.5)]),
])  # fmt: skip
def test_a_tag_becomes_a_lora_and_leaves_the_prompt(prompt, left, loras):
    request, weights = syntax.settled(Request(prompt=prompt), find)
    assert (request.prompt, request.loras) == (left, tuple(loras))
    assert weights == {lora.name: lora.weight for lora in loras}
    assert syntax.settled(request, find) == (request, {})


def test_tags_come_after_the_requests_own_loras():
    request, weights = syntax.settled(Request(prompt="a <lora:owl:0.5>", loras=[Lora("raccoon")]), find)
    assert request.weights == {"raccoon": 1.0, "owl": 0.5} and weights == {"owl": 0.5}


@pytest.mark.parametrize(("request_", "said"), [
    (Request(prompt="a <lora:fox:1>"), "no LoRA is named 'fox'"),
    (Request(prompt="a <lora:owl:heavy>"), "'heavy' is not read"),
    (Request(prompt="a <lora:owl:1:1:lbw=OUTALL>"), "lbw"),
    (Request(prompt="a <lora:owl:0.8@0,0.2@0.5>"), "0.8@0"),
    (Request(prompt="a <lora:owl:99>"), "at most 10"),
    (Request(prompt="a <lora:owl:nan>"), "tag"),
    (Request(prompt="a <lora:owl:0.8"), "no whole tag"),
    (Request(prompt="a <lora:>"), "no whole tag"),
    (Request(prompt="a <lora:owl:1>", loras=[Lora("owl")]), "twice"),
    (Request(prompt="a <lora:owl:1> <lora:owl:0.5>"), "twice"),
    (Request(prompt="a", negative="bad <lora:owl:1>"), "negative prompt"),
])  # fmt: skip
def test_a_tag_that_cannot_be_used_is_refused(request_, said):
    with pytest.raises(Refused, match=said):
        syntax.settled(request_, find)


@pytest.mark.parametrize(("prompt", "pieces"), [
    ("a (red hair:1.2) fox", ["(red hair:1.2)"]),
    ("a ((masterpiece)) fox", ["((masterpiece))"]),
    ("[fox:owl:0.5] BREAK a cat AND a dog", ["[fox:owl:0.5]", "BREAK", "AND"]),
    ("[a|b], {red|blue} __colour__", ["[a|b]", "{red|blue}", "__colour__"]),
    ("((a:1.1) b:0.9)", ["((a:1.1) b:0.9)"]),
    ("embedding:bad_hands <hypernet:x:1>", ["embedding:bad_hands", "<hypernet:x:1>"]),
    ("a fox (small), 3:4 and break of day, the brand ANDROID", []),
    (r"a logo \(2024:1\), 50% off: now", []),
    ("unclosed (a:1.2 and [b:c", []),
])  # fmt: skip
def test_what_a_request_of_schema_1_reads_as_plain_words_is_found(prompt, pieces):
    assert syntax.unread_in(prompt, schema=1) == pieces


@pytest.mark.parametrize(("prompt", "pieces"), [
    ("a (red hair:1.2) fox, ((masterpiece)) [dull] BREAK embedding:bad_hands", []),
    ("[fox:owl:0.5] BREAK a cat AND a (dog:1.1)", ["[fox:owl:0.5]", "AND"]),
    ("[a|b], {red|blue} __colour__ <hypernet:x:1>", ["[a|b]", "{red|blue}", "__colour__", "<hypernet:x:1>"]),
])  # fmt: skip
def test_what_is_read_as_plain_words_is_found(prompt, pieces):
    assert syntax.unread(Request(prompt=prompt)) == pieces


@pytest.mark.parametrize("part", ["<lora:", "<lora:a", " ", "(", "((a:1.1", "[::", "[a:", "a:1.1)", "__a", "\\(", "<random:", "embedding:"])
def test_time_is_linear_in_the_prompt(part):
    """Four times the prompt must not take sixteen times as long."""

    def seconds(count: int) -> float:
        prompt = part * count
        begun = time.perf_counter()
        syntax.untagged(prompt)
        syntax.unread_in(prompt, schema=1)
        syntax.unread_in(prompt)
        prompt_weights.plain(prompt)
        with suppress(Refused):
            prompt_weights.read(prompt)
        return time.perf_counter() - begun

    assert min(seconds(200_000) for _ in range(2)) < 10 * seconds(50_000) + 0.5
