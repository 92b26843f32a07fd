"""What the page offers and keeps, without a browser: goals and costs of methods, ways of a comparison, rows, dropped files, pictures made."""

import asyncio
import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
from PIL import Image

from app import cost
from app.ui import drops, examples, forms, job_view, lora_rows, made, method_choice, tiles
from app.ui.cards import Card
from app.ui.gallery import Gallery
from composition import Lora, Refused, Request, methods

SHELF = {key: Card(key, key, key.title(), triggers=(key,)) for key in ("owl", "wolf", "fox")}
PARTS = ["down", "mid", "up"]


# methods ----------------------------------------------------------------------------------------------------------------


def test_every_method_serves_a_goal_and_the_recommended_ones_stand_first():
    known = methods.all()
    goals = {name: method_choice.goal(method) for name, method in known.items()}
    assert {"merge": "add", "clora-fast": "place", "regions": "place", "cmlora": "turns", "np-lora": "fuse", "composite": "ask", "autolora": "gate"}.items() <= goals.items()
    assert set(goals.values()) == set(method_choice.GOALS)
    ordered = [method.name for method in method_choice.ordered(known)]
    assert sorted(ordered) == sorted(known) and ordered[0] == "merge"
    firsts = [next(name for name in ordered if goals[name] == goal) for goal in method_choice.GOALS]
    assert set(firsts) <= set(method_choice.RECOMMENDED)


@pytest.mark.parametrize(("words", "loras", "each"), [
    ("1", 3, 1), ("K", 3, 3), ("K + 1 (early about twice that; not so with SD 3 and FLUX)", 3, 4), ("about 1 + (K - 1) / 3", 4, 2), ("about 1.1 (SD 3 and FLUX: 1 + 3 K / steps)", 2, 1.1),
    ("1 (and K more, once for a set of LoRAs)", 9, 1), ("as many as it likes", 2, 1), ("K ** 9", 2, 1), ("K / (K - 2)", 2, 1)])
def test_what_a_cost_in_words_comes_to(words, loras, each):
    assert cost.expected(method_choice.plain(words), loras) == pytest.approx(each)


def test_the_line_under_a_method_has_its_cost():
    composite = method_choice.sentence(methods.find("composite"), 3, 20, lambda each: 20 * each)
    assert "20 steps of 3 evaluations: 60, about 60 s." in composite
    assert "20 steps of 1 evaluation." in method_choice.sentence(methods.find("merge"), 3, 20, lambda each: None)


@pytest.mark.parametrize("name", methods.all())
def test_options_go_into_the_form_and_come_out(name):
    method = methods.find(name)
    assert forms.options(method, forms.answers(method, {})) == {}
    for item in fields(method.options):
        low, high = item.metadata.get("ge"), item.metadata.get("le")
        value = next((bound for bound in (high, low) if bound is not None and bound != getattr(method.options(), item.name)), None)
        if value is not None:
            value = type(getattr(method.options(), item.name))(value) if getattr(method.options(), item.name) is not None else value
            assert forms.options(method, forms.answers(method, {item.name: value})) == {item.name: value}


# ways -------------------------------------------------------------------------------------------------------------------


def test_the_ways_of_a_comparison():
    request = Request(prompt="x", loras=[Lora("owl", weight=0.5), Lora("wolf")], method="switch", options={"tau": 3}, seed=7, count=2)
    found = tiles.ways(request, ["switch", "merge"], 2, [0.5, 1.0], ["none", "each"])
    assert [way.title for way in found[:7]] == ["Without LoRAs", "owl alone", "wolf alone", "Switch at 0.5", "Switch at 1", "Merge at 0.5", "Merge at 1"]
    assert [way.request.seed for way in found] == [7] * 7 + [8] * 7 and {way.request.count for way in found} == {1}
    assert found[3].request.options == {"tau": 3} and found[5].request.options == {} and [lora.weight for lora in found[3].request.loras] == [0.25, 0.5]
    with pytest.raises(Refused, match="at most"):
        tiles.ways(request, list(methods.all()), 8)
    with pytest.raises(Refused, match="nothing to compare"):
        tiles.ways(request, [], 1)


@pytest.mark.parametrize(("text", "numbers"), [("", [1.0]), ("0.6, 1", [0.6, 1.0]), ("1 1", [1.0]), ("x", None), ("9", None), ("nan", None), ("1 2 3 1 2 3 1", None)])
def test_factors_are_few_numbers(text, numbers):
    if numbers is None:
        with pytest.raises(Refused, match="weights"):
            tiles.factors(text)
    else:
        assert tiles.factors(text) == numbers


def test_a_tile_escapes_what_it_says():
    way = tiles.Way("<b>x</b>", Request(prompt="<i>y</i>"))
    shown = tiles.grid([tiles.Tile(way, state="<u>"), tiles.Tile(way, address="/pictures/a", size=(8, 8))])
    assert not any(tag in shown for tag in ("<b>", "<i>", "<u>"))


# rows -------------------------------------------------------------------------------------------------------------------


def test_rows_become_loras_and_loras_become_rows():
    value = [{"key": "owl", "weight": 0.5, "on": True, "binds": " the owl ", "blocks": "up"}, {"key": "wolf", "weight": 1, "on": False}, {"key": "fox", "weight": 1}]
    loras = lora_rows.loras(value, SHELF, PARTS)
    assert loras == [Lora("owl", weight=0.5, binds="the owl", blocks={"down": 0, "mid": 0}), Lora("fox")]
    request = Request(prompt="x", loras=[*loras, Lora("gone", weight=0.3), Lora("wolf", start=0.5, region=[0, 0, 1, 1], blocks={"up.1": 0.5})])
    rows, lacking = lora_rows.rows(request, SHELF, PARTS)
    assert [(row["key"], row["weight"], row["binds"], row["blocks"]) for row in rows] == [("owl", 0.5, "the owl", "up"), ("fox", 1.0, "", ""), ("wolf", 1.0, "", "")]
    assert lacking[0] == "LoRA gone (weight 0.3) is not here" and len(lacking) == 4
    for wrong in ({"key": "/etc/passwd"}, {"key": "owl", "blocks": "side"}, {"key": "owl", "binds": ["x"]}):
        with pytest.raises(Refused):
            lora_rows.loras([{"weight": 1, **wrong}], SHELF, PARTS)


def test_examples_are_offered_where_their_loras_are():
    assert examples.offered(SHELF) == [examples.EXAMPLES[0]] and examples.offered({}) == []
    assert all(example.method in methods.all() for example in examples.EXAMPLES)


def test_a_refusal_speaks_of_the_page():
    shown = job_view.refusal('name the words it belongs to with binds, as in {"source": "owl", "binds": "the fox"}, or <b>')
    assert "under “belongs to”" in shown and "source" not in shown and "<b>" not in shown


# dropped files ----------------------------------------------------------------------------------------------------------


def take(held: drops.Drops, name: str, *parts: bytes, length: int | None = None) -> dict[str, str]:
    messages = [{"type": "http.request", "body": part, "more_body": number + 1 < len(parts)} for number, part in enumerate(parts)]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return asyncio.run(held.take(f"/dropped/{name}", sum(map(len, parts)) if length is None else length, receive))


@pytest.fixture
def held():
    receipt = SimpleNamespace(applied=3, line=lambda: "x: applied 3/3")
    kept = drops.Drops(SimpleNamespace(inspect=lambda source: receipt))
    yield kept
    kept.close()
    assert not kept._folder.exists()


def test_a_dropped_file_is_named_by_what_is_left_of_its_name(held):
    for name in ("..%2F..%2Fetc%2Fa<b>.safetensors", "C%3A%5Cx%5Ca<b>.SAFETENSORS"):
        assert take(held, name, b"ab", b"c") == {"name": "a_b_", "receipt": "x: applied 3/3"}
    assert [path.read_bytes() for path in held.files()] == [b"abc", b"abc"] and all(held._folder in path.parents for path in held.files())


def test_what_is_dropped_is_bounded(held, monkeypatch):
    assert "run code" in take(held, "a.ckpt", b"x")["trouble"]
    assert "did not come whole" in take(held, "a.safetensors", b"x", length=9)["trouble"]
    assert "longer than was said" in take(held, "a.safetensors", b"xyz", length=1)["trouble"]
    assert "over 2 GB" in take(held, "a.safetensors", b"x", length=3_000_000_000)["trouble"]
    monkeypatch.setattr(drops, "MOST_FILES", 0)
    assert "no room" in take(held, "a.safetensors", b"x")["trouble"]
    assert held.files() == [] and list(held._folder.iterdir()) == []


# pictures made ----------------------------------------------------------------------------------------------------------


def test_a_manifest_chooses_no_file_outside_its_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(folder / "0000.png")
    (folder / "0001.png").symlink_to(tmp_path / "secret.png")
    names = ["0000.png", "../secret.png", str(tmp_path / "secret.png"), "0001.png", "gone.png", "stars.json", 3, "0000.png"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": "a fox", "loras": ["owl"], "seed": 3}) + "\n" for name in names) + "{\n")
    (only,) = made.pictures(folder)
    assert (only.path, only.loras, only.seed, only.starred) == (folder / "0000.png", ("owl",), 3, False)
    made.star(only.path, True)
    assert next(made.pictures(folder)).starred
    made.delete(only.path)
    assert list(made.pictures(folder)) == [] and made.stars(folder) == set()
    (folder / "stars.json").write_text('{"a": 1}')
    assert made.stars(folder) == set()


def test_an_archive_takes_the_place_of_the_last(tmp_path):
    gallery, addresses = Gallery(), []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.zip").write_bytes(name.encode())
        addresses.append(gallery.archive(tmp_path / name / "x.zip"))
    assert gallery.read(addresses[0]) is None and not (tmp_path / "a").exists()
    body, headers = gallery.read(addresses[1])
    assert body == b"b" and headers["content-type"] == "application/zip" and gallery.path(addresses[1]) is None
    gallery.forget_archives()
    assert gallery.read(addresses[1]) is None
