"""The page as an artist uses it, in a real browser: the example, rows of LoRAs, a dropped file, a comparison, a recalled picture, the gallery."""

import base64
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.ui import serve
from composition import Engine, record
from tests.app.ui.test_page import EVIL, Server, done, download, fill, generate, more, tab  # noqa: F401  tab is a fixture
from tests.app.ui.visitor import free_port

pytestmark = pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword).*")  # gradio on pandas 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("compose")
    with Engine.open("pocket", device="cpu") as engine, serve.opened(engine, root / "pictures", free_port()) as address:
        yield Server(address, root / "pictures", engine)


def test_the_example_is_made_by_keyboard_alone_compared_and_taken_back(server, tab, tmp_path):  # noqa: F811
    page = tab(example=True)
    more(page, steps=4, size="64x64")
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Shift+Enter")
    done(page)
    found = record.read(download(page, tmp_path / "a.png"))
    assert [lora.source for lora in found.loras] == ["wolf", "owl"] and found.method == "clora-fast" and found.prompt == "a wolf and an owl in the forest"
    page.locator("#report .verdicts li").nth(2).wait_for()
    assert [text.split()[0] for text in page.locator("#report .verdicts li").all_inner_texts()] == ["wolf", "owl", "in"]
    page.locator("#compare-methods").focus()
    page.keyboard.press("Enter")
    page.locator("#compare-status .done").wait_for()
    tiles = page.locator("#compare-grid .tile")
    assert [re.match(r"[A-Za-z ]+?(?= ?seed|$)", text)[0].strip() for text in page.locator("#compare-grid figcaption strong").all_inner_texts()] == [
        "Without LoRAs", "CLoRA fast", "Merge", "Switch", "Composite"]
    assert all(f"seed {found.seed}" in text and "evaluations" in text for text in tiles.all_inner_texts())
    for tile in tiles.all():
        lost = tile.locator(".verdicts .lost").all_inner_texts()
        assert tile.locator(".gone").count() == bool(lost)
    page.get_by_label(f"Use Switch, seed {found.seed}").click()
    page.wait_for_function("() => document.querySelector('#method input').value.startsWith('Switch')")
    assert page.locator("#seed input").input_value() == str(found.seed) and not page.get_by_label("Random seed").is_checked()
    page.locator("#picture.final").wait_for()
    assert page.evaluate("document.querySelector('#goal input:checked').value") == "turns"


def test_a_rows_switch_place_words_and_blocks_reach_the_request(tab, tmp_path):  # noqa: F811
    page = tab()
    for name in ("Wolf", "Ink line", "Owl"):
        page.get_by_label(f"Use {name}").check()
    page.get_by_label("Weight of Ink line as a number").fill("0.35")
    page.get_by_label("Ink line is on").uncheck()
    page.get_by_label("Move up Owl").click()
    page.get_by_label("Move up Owl").click()
    page.get_by_label("Wolf belongs to").fill("the grey one")
    page.get_by_label("Blocks of Owl").select_option("up")
    fill(page, "prompt", "the grey one and an owl")
    more(page, steps=2, size="64x64")
    generate(page)
    done(page)
    owl, wolf = record.read(download(page, tmp_path / "a.png")).loras
    assert (owl.source, dict(owl.blocks), wolf.source, wolf.binds) == ("owl", {"down": 0, "mid": 0}, "wolf", "the grey one")
    page.get_by_label("Ink line is on").check()
    assert page.get_by_label("Weight of Ink line as a number").input_value() == "0.35"
    page.get_by_label("Remove Wolf").click()
    assert page.locator(".lora").evaluate_all("rows => rows.map(row => row.dataset.key)") == ["owl", "ink"] and not page.get_by_label("Use Wolf").is_checked()


def test_a_file_is_dropped_on_a_phone_and_what_is_no_lora_is_a_sentence(server, tab, tmp_path):  # noqa: F811
    page = tab(width=390, height=844)
    name = 'my <img src=x onerror="window.evil=9"> owl.safetensors'
    shutil.copy(server.engine.find("owl"), tmp_path / name)
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 64)
    for path, said in ((tmp_path / name, "applied 182/182 tensors"), (tmp_path / "bad.safetensors", "bad.safetensors")):
        page.get_by_label("Add a LoRA file").set_input_files(str(path))
        page.locator("#loras .said").get_by_text(said).wait_for()
    page.locator(".lora").wait_for()
    assert page.locator("#loras .said").evaluate("line => line.classList.contains('trouble')") and str(tmp_path.parent) not in page.locator("#loras").inner_text()
    assert page.locator("#loras [src=x]").count() == 0 and page.evaluate("window.evil") is None
    fill(page, "prompt", "an owl")
    more(page, steps=1, size="64x64")
    box = page.locator("#generate").bounding_box()
    assert 0 < box["y"] < 844 - box["height"] and page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    generate(page)
    done(page)
    assert "owl: applied 182/182" in page.locator("#report").inner_text()


def test_a_picture_is_recalled_with_what_is_missing_and_the_gallery_keeps_it(server, tab, tmp_path):  # noqa: F811
    page = tab()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Use Raccoon").check()
    fill(page, "prompt", f"a raccoon {EVIL}")
    more(page, steps=3, size="64x64", negative="fog")
    generate(page)
    done(page)
    made = download(page, tmp_path / "a.png")
    with Image.open(made) as image:
        document = json.loads(image.text["medley"])
        document["request"]["loras"].append(document["request"]["loras"][0] | {"source": "gone <b>", "weight": 0.5})
        document["receipts"]["gone <b>"] = document["receipts"]["raccoon"]
        info = PngInfo()
        info.add_itxt("medley", json.dumps(document))
        image.save(tmp_path / "other.png", pnginfo=info)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.locator("#clear").click()
    page.get_by_label("Recall the settings").set_input_files(str(tmp_path / "plain.png"))
    page.locator("#status").get_by_text("plain.png has no request in it").wait_for()
    page.get_by_label("Recall the settings").set_input_files(str(tmp_path / "other.png"))
    page.locator("#status").get_by_text("LoRA gone <b> (weight 0.5) is not here").wait_for()
    page.wait_for_function("() => document.querySelectorAll('.lora').length === 1")
    seed = record.read(made).seed
    assert page.locator("#prompt textarea").input_value() == f"a raccoon {EVIL}" and page.locator("#seed input").input_value() == str(seed)
    assert page.locator("#negative textarea").input_value() == "fog" and page.locator("#size input, #size textarea").first.input_value() == "64x64"
    page.get_by_role("tab", name="Gallery").click()
    tile = page.locator("#gallery-grid .tile").first
    tile.get_by_label("Star 0").click()
    page.get_by_label("Starred only").check()
    page.locator("#gallery-status").get_by_text("1 of ").wait_for()
    page.locator("#gallery-pack").click()
    with page.expect_download() as waiting:
        page.locator("#packed").click()
    waiting.value.save_as(tmp_path / "all.zip")
    (name,) = zipfile.ZipFile(tmp_path / "all.zip").namelist()
    assert zipfile.ZipFile(tmp_path / "all.zip").read(name) == made.read_bytes()
    tile.get_by_label("Delete").click()
    page.locator("#gallery-status").get_by_text("0 of ").wait_for()
    assert not (server.pictures / name).exists() and page.evaluate("window.evil") is None


def test_every_action_is_an_endpoint_of_that_name(server):
    """`gradio_client` drives each; LoRAs are named by what the page offers, never by path."""
    from gradio_client import Client

    from app.ui.api import ENDPOINTS

    client = Client(server.address, verbose=False, download_files=False)
    assert {name.strip("/") for name in client.view_api(return_format="dict", print_info=False)["named_endpoints"]} == set(ENDPOINTS)
    (wolf,) = client.predict("wolf", api_name="/loras")
    assert wolf == {"name": "wolf", "title": "Wolf", "category": "character", "triggers": ["wolf"], "trouble": ""}
    assert "merge" in [method["name"] for method in client.predict(api_name="/methods")]
    answer = client.predict("a wolf", [{"name": "wolf", "weight": 0.9}], steps=2, size="64x64", seed=5, api_name="/generate")
    path = server.pictures / Path(answer["picture"]).name
    found = record.read(path)
    assert (found.seed, found.steps, found.loras[0].weight, answer["evaluations"]) == (5, 2, 0.9, 2) and answer["receipts"]
    tiles = client.predict("a wolf", [{"name": "wolf"}], ["merge", "switch"], steps=1, seed=5, api_name="/compare")
    assert [tile["title"] for tile in tiles] == ["Without LoRAs", "Merge", "Switch"] and all(tile["seed"] == 5 for tile in tiles)
    assert client.predict(3, "composite", 10, api_name="/estimate")["evaluations"] == 30
    recalled = client.predict("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(), api_name="/recall")
    assert json.loads(recalled["request"])["seed"] == 5 and recalled["differs"] == []
    for bad, said in (({"loras": [{"name": "/etc/passwd"}]}, "is not there"), ({"steps": 5000}, "steps"), ({"size": "99999x99999"}, "pixels"), ({"method": "mrge"}, "did you mean")):
        with pytest.raises(Exception, match=said):
            client.predict("a wolf", **bad, api_name="/generate")
