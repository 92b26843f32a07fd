"""The words of the command line become a request, or one plain sentence."""

import pytest

from app import options
from app.cli import flags
from composition import Embedding, Lora, Receipt, Refused, Request


@pytest.mark.parametrize(("text", "source", "weight"), [
    ("owl", "owl", 1.0),
    ("owl:0.8", "owl", 0.8),
    ("owl:-1", "owl", -1.0),
    ("owl:.5", "owl", 0.5),
    ("owl:1e-1", "owl", 0.1),
    ("loras/owl.safetensors", "loras/owl.safetensors", 1.0),
    ("loras/owl.safetensors:0.3", "loras/owl.safetensors", 0.3),
    (r"C:\loras\owl.safetensors", r"C:\loras\owl.safetensors", 1.0),
    (r"C:\loras\owl.safetensors:0.8", r"C:\loras\owl.safetensors", 0.8),
    ("C:/loras/owl.safetensors", "C:/loras/owl.safetensors", 1.0),
    ('{"lora_id": "owl", "lora_scale": 0.4}', "owl", 0.4),
    ('{"source": "owl", "weight": 2}', "owl", 2.0),
])
def test_lora(text, source, weight):
    assert flags.lora(text) == Lora(source, weight=weight)


def test_lora_json_reaches_every_field():
    assert flags.lora('{"source": "owl", "blocks": {"up": 0.5}, "end": 0.6}') == Lora("owl", blocks={"up": 0.5}, end=0.6)


def test_lora_with_a_colon_in_a_file_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").touch()
    assert flags.lora("a:b") == Lora("a:b")


@pytest.mark.parametrize("text", [
    "owl:", "owl:much", "owl:nan", "owl:inf", "owl:1,5", "", " ", ":0.5", "owl:11", "{", '{"weight": 1}',
    '{"source": "owl", "colour": 1}', '{"source": "owl", "weight": "x"}'])
def test_lora_refused_naming_what_was_given(text):
    with pytest.raises(Refused, match="--lora"):
        flags.lora(text)


@pytest.mark.parametrize(("text", "size"), [("512x768", (512, 768)), ("512", (512, 512)), (" 64 X 32 ", (64, 32))])
def test_size(text, size):
    assert options.size(text) == size


@pytest.mark.parametrize("text", ["", "x", "512x", "-1x2", "512x512x3", "1.5"])
def test_size_refused(text):
    with pytest.raises(Refused, match="--size"):
        options.size(text)


def test_options_have_the_types_of_the_method():
    read = options.options(["tau=3", "reference=true"], "switch")
    assert read == {"tau": 3, "reference": True}
    assert [type(value) for value in read.values()] == [int, bool]


@pytest.mark.parametrize(("pair", "said"), [
    ("tau", "key=value"), ("=3", "key=value"), ("taw=3", "tau"), ("tau=0", "between"), ("tau=x", "tau"), ("tau=[1]", "tau")])
def test_options_refused(pair, said):
    with pytest.raises(Refused, match=said):
        options.options([pair], "switch")


def test_flags_override_the_request_they_start_from():
    start = Request(prompt="old", loras=[Lora("fox")], method="switch", options={"tau": 3}, seed=9, steps=7, size=(64, 64))
    assert flags.request({"prompt": None, "lora": None, "steps": None}, start) == (start, False)
    made, _ = flags.request({"prompt": "new", "lora": ["owl:0.5"], "steps": 3, "size": "32"}, start)
    assert made == Request(prompt="new", loras=[Lora("owl", weight=0.5)], method="switch", options={"tau": 3}, seed=9,
                           steps=3, size=(32, 32))
    assert flags.request({"option": ["reference=1"]}, start)[0].options == {"tau": 3, "reference": True}
    assert flags.request({"method": "merge"}, start)[0].options == {}


def test_an_option_of_every_method_is_kept_unless_it_is_taken_back():
    start = Request(prompt="old", anchored=True)
    assert flags.request({"anchored": None, "windows": "both"}, start)[0] == Request(prompt="old", anchored=True, windows="both")
    assert flags.request({"anchored": False, "windows": None}, start)[0] == Request(prompt="old")


def test_a_seed_is_drawn_only_when_none_is_there():
    first, drawn = flags.request({"prompt": "a"})
    second, _ = flags.request({"prompt": "a"})
    assert drawn
    assert first.seed != second.seed
    assert flags.request({"prompt": "a", "seed": 0}) == (Request(prompt="a", seed=0), False)


def _inspect(source: str) -> Receipt:
    words = {"owl": ("hooty", "owlish"), "fox": ("FoxWord",)}.get(source, ())
    return Receipt(name=source, path="", sha256="", tensor_sha256="", family="sd", layout="kohya", tensors=1, applied=1,
                   triggers=words)


def test_triggers_are_added_only_where_none_is_there():
    request = Request(prompt="a foxword in snow", loras=[Lora("owl"), Lora("fox"), Lora("ink"), Lora("owl")])
    made, added = flags.with_triggers(request, _inspect)
    assert (made.prompt, added) == ("a foxword in snow, hooty", ["hooty"])
    assert flags.with_triggers(made, _inspect) == (made, [])
    own = Request(prompt="", loras=[Lora("owl", triggers=("mine",))])
    assert flags.with_triggers(own, _inspect)[0].prompt == "mine"


@pytest.mark.parametrize(("text", "source", "word"), [
    ("cat.safetensors", "cat.safetensors", ""), ("cat:sks", "cat", "sks"), (r"C:\words\cat.safetensors", r"C:\words\cat.safetensors", ""),
    (r"C:\words\cat.safetensors:<sks>", r"C:\words\cat.safetensors", "<sks>"), ('{"source": "cat", "word": "a:b"}', "cat", "a:b"),
])  # fmt: skip
def test_embedding(text, source, word):
    assert flags.embedding(text) == Embedding(source, word)


@pytest.mark.parametrize("text", ["", ":", "cat:", '{"word": "a"}', '{"source": "a", "b": 1}', "{"])
def test_embedding_refused(text):
    with pytest.raises(Refused, match="--embedding"):
        flags.embedding(text)


def test_an_old_prompt_that_is_replaced_is_read_as_today():
    """What is kept of an older request means what it meant; what is new means what it means now."""
    old = Request(prompt="a (fox:1.2)", negative="(dull)", schema_version=1)
    kept, _ = flags.request({"seed": 3, "guidance": 4}, old)
    assert (kept.prompt, kept.schema_version) == ("a (fox:1.2)", 1)
    renewed, _ = flags.request({"prompt": "an (owl:1.2)", "vae": "a/b", "embedding": ["cat:sks"]}, old)
    assert (renewed.prompt, renewed.negative, renewed.schema_version, renewed.vae) == ("an (owl:1.2)", r"\(dull\)", 2, "a/b")
    assert renewed.embeddings == (Embedding("cat", "sks"),)
