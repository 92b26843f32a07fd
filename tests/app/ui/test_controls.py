"""The pictures that control on the page, in a real browser, on the bundled FLUX; and what else may be sent in their place."""

import io
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydantic import ValidationError

from app.ui import controls, serve
from app.ui.cards import data_url
from composition import Condition, Engine, Refused, pictures, record
from composition.annotators import annotate
from tests.app.ui.test_page import Server, done, download, fill, generate, more, tab  # noqa: F401  tab is a fixture
from tests.app.ui.visitor import Visitor, free_port, shown_until
from tests.toys import condition

pytestmark = pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword).*")  # gradio on pandas 3
NAME = "<img src=x onerror=alert(7)>.png"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("ui")
    (root / "own").mkdir()
    with Engine.open("pocket-flux", device="cpu", folders=[root / "own"]) as engine:
        condition(engine.backbone.denoiser, root / "own/edges.safetensors", kind="spatial", size=32, annotator="canny")
        condition(engine.backbone.denoiser, root / "own/figure.safetensors", seed=1, kind="subject", size=32)
        with serve.opened(engine, root / "pictures", free_port()) as address:
            yield Server(address, root / "pictures", engine)


def photo(path: Path, size=(300, 200), **more: object) -> Path:
    picture = Image.new("RGB", size, "navy")
    ImageDraw.Draw(picture).ellipse((size[0] // 6, size[1] // 6, size[0] // 2, size[1] - 20), fill="gold")
    picture.save(path, **more)
    return path


def choose(page, *paths: Path) -> None:
    """Choose these files, and wait until each is drawn or refused."""
    before = page.locator(".control").count()
    page.get_by_label("Add a picture that controls").set_input_files([str(path) for path in paths])
    page.wait_for_function(f"() => document.querySelectorAll('.control').length === {before + len(paths)}")
    settled(page)


def settled(page) -> None:
    page.wait_for_function("() => [...document.querySelectorAll('.control')].every(row => row.querySelector('.drawn').src || row.querySelector('.trouble').textContent)")


def expected(image: str, annotator: str) -> str:
    """What the page should show of a picture."""
    drawn = annotate(annotator, pictures.condition(image), (64, 64))
    drawn.thumbnail((controls.SIDE, controls.SIDE))
    return data_url(drawn)


def test_pictures_that_control_travel_into_the_record(server, tab, tmp_path):  # noqa: F811
    page = tab(width=1280, height=1500)
    assert page.locator(".card[data-key=edges]").count() == 0  # a condition LoRA is no LoRA to compose
    choose(page, photo(tmp_path / "me.png"), photo(tmp_path / "it.png", (160, 160)))
    page.get_by_label("What reads me.png").select_option("edges")
    page.get_by_label("What reads it.png").select_option("figure")
    page.get_by_label("Strength of me.png as a number").fill("0.8")
    page.get_by_label("Start of it.png in percent").fill("20")
    page.get_by_label("End of it.png in percent").fill("75")
    settled(page)
    shown = page.locator(".control .drawn").evaluate_all("images => images.map(image => image.src)")
    if folder := os.environ.get("MEDLEY_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/controls.png", full_page=True)
    fill(page, "prompt", "a fox")
    more(page, steps=4)
    generate(page)
    done(page)
    report = page.locator("#report").inner_text()
    assert "edges by me.png through canny, strength 0.8" in report and "figure by it.png, strength 1, from 20% to 75% of the steps" in report
    path = download(page, tmp_path / "got.png")
    first, second = record.read(path).conditions
    assert (first.source, first.annotator, first.strength, first.start, first.end) == ("edges", "canny", 0.8, 0, 1)
    assert (second.source, second.strength, second.start, second.end) == ("figure", 1, 0.2, 0.75)
    assert shown == [expected(first.image, "canny"), expected(second.image, "")]
    with Image.open(tmp_path / "me.png") as sent:
        assert (np.asarray(pictures.condition(first.image)) == np.asarray(sent)).all()
    made = server.engine.run(record.by_name(record.read(path))).images[0]
    with Image.open(path) as image:
        assert image.tobytes() == made.tobytes()


def test_what_the_annotator_makes_follows_the_choice(tab, tmp_path):  # noqa: F811
    page = tab()
    choose(page, photo(tmp_path / "me.png"))
    page.get_by_label("What reads me.png").select_option("edges")
    settled(page)
    drawn, annotator = page.locator(".control .drawn"), page.get_by_label("Annotator of me.png")
    image = page.locator(".control .pair img").first.get_attribute("src")
    assert drawn.get_attribute("src") == expected(image, "canny") and annotator.input_value() == "usual"
    for choice, name in (("scribble", "scribble"), ("none", ""), ("usual", "canny"), ("usual", "canny"), ("tile", "tile")):
        annotator.select_option(choice)
        settled(page)
        assert drawn.get_attribute("src") == expected(image, name)
    annotator.select_option("hole")
    page.locator(".control .trouble").get_by_text("This picture has no hole").wait_for()
    assert drawn.get_attribute("src") is None
    page.get_by_label("Remove me.png").click()
    assert page.locator(".control").count() == 0


def test_a_dropped_photo_is_turned_and_shrunk(tab, tmp_path):  # noqa: F811
    page = tab(width=420)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = photo(tmp_path / "huge.jpg", (3000, 1500), exif=exif).read_bytes()
    page.locator("#controls .drop").evaluate("""(zone, bytes) => {
      const carried = new DataTransfer();
      carried.items.add(new File([new Uint8Array(bytes)], "huge.jpg", { type: "image/jpeg" }));
      zone.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
    }""", list(data))
    page.locator(".control").wait_for()
    settled(page)
    image = page.locator(".control .pair img").first.get_attribute("src")
    assert pictures.condition(image).size == (512, 1024) and pictures.origin(image) == "huge.jpg"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_rough_photos_fit_through_the_door(tab, tmp_path):  # noqa: F811
    page = tab()
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "rough.png")
    for number in range(controls.MOST):
        choose(page, tmp_path / "rough.png")
        assert len(page.locator(".control .pair img[alt='rough.png']").nth(number).get_attribute("src")) < controls.MAX_TEXT
    assert page.locator("#controls .drop").is_hidden()
    fill(page, "prompt", "a fox")
    more(page, steps=1)
    generate(page)
    done(page)
    assert page.locator("#report .control").count() == controls.MOST


def test_what_is_no_picture_or_has_no_edges_is_a_sentence(tab, tmp_path):  # noqa: F811
    page = tab()
    (tmp_path / "text.png").write_text("hello")
    page.get_by_label("Add a picture that controls").set_input_files(str(tmp_path / "text.png"))
    page.locator("#controls .said").get_by_text("text.png cannot be read as a picture").wait_for()
    Image.new("RGB", (64, 64), "teal").save(tmp_path / NAME)
    choose(page, tmp_path / NAME)
    page.get_by_label("What reads").select_option("edges")
    page.locator(".control .trouble").get_by_text("There are no edges in this picture").wait_for()
    assert page.locator(".control strong").inner_text() == NAME and page.locator("#controls [onerror]").count() == 0
    fill(page, "prompt", "a fox")
    generate(page)
    page.locator("#status").get_by_role("alert").wait_for()
    assert "no edges" in page.locator("#status").inner_text()


# what else may be sent ----------------------------------------------------------------------------------------------------


def picture() -> str:
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 90).convert("RGB").save(stream, format="PNG")
    return data_url(Image.open(stream))


def row(**changes: object) -> dict:
    return {"source": "edges", "image": picture(), "annotator": None, "strength": 1, "start": 0, "end": 1} | changes


@pytest.mark.parametrize(("rows", "what"), [
    ([row(image="/etc/hostname")], "drop it anew"), ([row(image=3)], "drop it anew"), ([row(image="data:image/png;base64," + "A" * 1_000_000)], "drop it anew"),
    ([row(source="/etc/edges.safetensors")], "reload the page"), ([row()] * 5, "takes 4 at most"), ([row(strength=-1)], "strength"),
    ([row(strength="x")], "strength"), ([row(start=1)], "before end"), ([row(annotator=["x"])], "annotator")])
def test_conditions_of_the_page_name_no_file_and_nothing_else(rows, what):
    with pytest.raises((Refused, ValidationError), match=what):
        controls.conditions(rows, ["edges"])


def test_conditions_of_the_page():
    assert controls.conditions(None, []) == [] and controls.conditions([], ["edges"]) == []
    sent = row(annotator="blur", strength=0.5, start=0.1, end=0.9)
    assert controls.conditions([sent], ["edges"]) == [Condition("edges", sent["image"], annotator="blur", strength=0.5, start=0.1, end=0.9)]


def test_a_path_in_place_of_a_picture_is_refused_on_the_wire(server, tmp_path):
    visitor = Visitor(server.address)
    visitor.join(prompt="a fox", controls=[row(image=str(photo(tmp_path / "secret.png")))])
    with visitor.listening() as events:
        assert "drop it anew" in shown_until(events, "process_completed")
    assert "drop it anew" in controls.look(str(tmp_path / "secret.png"), "canny", 7, (64, 64))["trouble"]
    assert "did you mean" in controls.look(picture(), "cany", 1, (64, 64))["trouble"]


def test_bundled_ones_come_first_and_no_path_is_shown():
    control = namedtuple("control", "path name kind annotator sort bundled")
    listed = [control(Path("/home/me/b"), "b", "spatial", "canny", "ControlNet", False), control(Path("/x/a"), "a", "subject", "", "condition LoRA", True)]
    engine = namedtuple("engine", "conditions")(lambda: listed)
    assert controls.sources(engine) == [{"key": "a", "title": "a (condition LoRA)", "annotator": ""}, {"key": "b", "title": "b (ControlNet)", "annotator": "canny"}]
