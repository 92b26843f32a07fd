"""The page in a real browser: Debian's chromium, led by Playwright, on the bundled model."""

import base64
import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from app.ui import serve
from composition import Engine, record
from tests.app.ui.visitor import free_port

pytestmark = pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword).*")  # gradio on pandas 3
PATIENCE = 60_000  # milliseconds until a test gives up
LONG = 1000  # steps: a picture that is still in the making when something else is looked at
EVIL = '<img src=x onerror="window.evil=1">${window.evil=2}{{window}}`'


EVIL_NAME = "<img src=x onerror=alert(7)>&amp;\"'"
FIELDS = ("title", "trigger_words", "category", "version", "author", "description", "tags", "base", "license", "usage", "notes", "preview",
          "modelspec.title", "modelspec.author", "modelspec.description", "modelspec.license", "modelspec.tags", "modelspec.trigger_phrase",
          "modelspec.thumbnail", "modelspec.architecture", "modelspec.usage_hint", "ss_output_name", "ss_tag_frequency", "ss_training_comment",
          "ss_sd_model_name", "ss_base_model_version", "ss_network_module")  # fmt: skip


class Server:
    """The page's address, the folder of its pictures, and its engine."""

    def __init__(self, address: str, pictures: Path, engine: Engine) -> None:
        self.address, self.pictures, self.engine = address, pictures, engine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("ui")
    (root / "own").mkdir()
    with Engine.open("pocket", device="cpu", folders=[root / "own"]) as engine:
        tensors = load_file(engine.find("owl"))
        file = io.BytesIO()
        Image.new("RGB", (64, 64), "teal").save(file, format="PNG")
        save_file(tensors, root / "own" / "pictured.safetensors", metadata={
            "title": "Pictured", "category": "place", "trigger_words": "tealword", "preview": base64.b64encode(file.getvalue()).decode()})
        save_file(tensors, root / "own" / "evil.safetensors", metadata={
            "title": EVIL, "trigger_words": "<script>window.evil=3</script>", "preview": "javascript:window.evil=4"})
        (root / "own" / "broken.safetensors").write_bytes(b"\0" * 20)
        save_file(tensors, root / "own" / "everything.safetensors", metadata={name: EVIL for name in FIELDS} | {"title": f"All {EVIL}"})
        save_file(tensors, root / "own" / f"{EVIL_NAME}.safetensors", metadata={"trigger_words": "plainword"})
        header = json.dumps({EVIL: {"dtype": EVIL, "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"title": EVIL}}).encode()
        (root / "own" / "reason.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with serve.opened(engine, root / "pictures", free_port()) as address:
            yield Server(address, root / "pictures", engine)


@pytest.fixture
def tab(server, browser):
    """Opens a new tab on the page. After the test: nothing went elsewhere, nothing failed in the browser."""
    opened, strays, errors = [], [], []

    def watch(request) -> None:
        if not request.url.startswith((server.address, "data:", "blob:")):
            strays.append(request.url)

    def open_tab(width=1280, height=900, *, example=False, **more):
        context = browser.new_context(viewport={"width": width, "height": height}, **more)
        context.set_default_timeout(PATIENCE)
        opened.append(context)
        page = context.new_page()
        page.on("request", watch)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.address)
        page.locator(".card[data-key=raccoon]").wait_for()
        page.locator("#generate").wait_for()
        if not example:
            page.locator("#clear").click()
            page.wait_for_function("() => !document.querySelector('#prompt textarea').value && !document.querySelector('.lora')")
        return page

    yield open_tab
    for context in opened:
        context.close()
    assert strays == []
    assert errors == []


def fill(page, name: str, value: object) -> None:
    """As a person does: write into the field and leave it."""
    field = page.locator(f"#{name} textarea, #{name} input").first
    field.fill(str(value))
    field.blur()


def unfold(page, name: str) -> None:
    """Open a folded part and wait until its fields keep what is written into them.

    One frame after Gradio first shows a folded part's fields, it sets them to their first values once more.
    """
    page.locator(f"#{name} button").first.click()
    page.locator(f"#{name} :is(input, textarea)").first.wait_for()
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")


def more(page, **values: object) -> None:
    """Open "More" and fill in its fields."""
    unfold(page, "more")
    for name, value in values.items():
        fill(page, name, value)


def choose_method(page, title: str) -> None:
    """Type the method's title and take it."""
    field = page.locator("#method input")
    field.click()
    field.fill(title)
    page.get_by_role("option").filter(has_text=re.compile(rf"^\W*{re.escape(title)}\W*·")).click()


def seed(page, value: int) -> None:
    page.get_by_label("Random seed").uncheck()
    fill(page, "seed", value)


def generate(page) -> None:
    page.locator("#generate").click()


def done(page):
    """The picture, when it is made and shown."""
    page.locator("#status .done").wait_for()
    page.locator("#picture.final").wait_for()
    page.wait_for_function("() => document.querySelector('#picture').complete && document.querySelector('#picture').naturalWidth")
    return page.locator("#picture")


def download(page, to: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator("#download").click()
    waiting.value.save_as(to)
    return to


def running(page) -> None:
    page.get_by_text(re.compile(r"Step [1-9]\d* of \d+")).wait_for()


def test_from_cards_to_a_picture_with_its_receipt(server, tab, tmp_path):
    page = tab()
    page.get_by_label("Use Raccoon").check()
    page.get_by_label("Use Ink line").check()
    page.get_by_label("Weight of Ink line as a number").fill("0.45")
    page.get_by_label("Weight of Raccoon", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_label("Weight of Raccoon as a number").input_value() == "0.95"
    fill(page, "prompt", "a raccoon in the snow, ink drawing")
    more(page, steps=200, negative="fog", size="64x64")
    generate(page)
    running(page)
    page.locator("#picture.preview").wait_for()
    assert page.locator("#cancel").is_enabled()
    picture = done(page)
    assert picture.evaluate("image => image.naturalWidth") == 64
    assert picture.evaluate("image => image.getBoundingClientRect().width") == 512
    assert picture.bounding_box()["width"] >= 400
    report = page.locator("#report").inner_text()
    for name in ("raccoon", "ink"):
        assert server.engine.inspect(name).line() in report
    found = record.read(download(page, tmp_path / "got.png"))
    assert [(lora.source, lora.weight) for lora in found.loras] == [("raccoon", 0.95), ("ink", 0.45)]
    assert (found.prompt, found.negative, found.steps) == ("a raccoon in the snow, ink drawing", "fog", 200)
    assert str(found.seed) in report and page.locator("#seed input").input_value() == str(found.seed)
    saved = sorted(server.pictures.glob("*.png"))[-1]
    assert str(saved) in report
    assert saved.read_bytes() == (tmp_path / "got.png").read_bytes()


def test_the_page_shows_where_each_concept_is_and_who_led_when(tab):
    page = tab(width=1280, height=1400)
    for name in ("Wolf", "Owl"):
        page.get_by_label(f"Use {name}", exact=True).check()
    fill(page, "prompt", "a wolf and an owl in the forest")
    choose_method(page, "CLoRA fast")
    more(page, steps=10, size="64x64")
    seed(page, 1)
    generate(page)
    done(page)
    drawn = page.locator("#report .places img")
    assert drawn.count() == 4
    assert all(drawn.nth(k).evaluate("image => image.complete && image.naturalWidth") == 256 for k in range(4))
    assert page.locator("#report .places").inner_text().count("its place") == 2
    if folder := os.environ.get("MEDLEY_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/places.png", full_page=True)
    page.evaluate("document.querySelector('#status .done').remove()")
    choose_method(page, "CMLoRA")
    generate(page)
    done(page)
    page.locator("#report .timeline").wait_for()
    told = page.locator("#report .timeline").inner_text().splitlines()
    assert {line.split()[0] for line in told[1:]} == {"phase", "wolf", "owl"} and page.locator("#report .places").count() == 0
    assert "order by measured change" in page.locator("#report").inner_text()
    if folder := os.environ.get("MEDLEY_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/timeline.png", full_page=True)


def test_the_same_seed_makes_the_same_bytes_and_those_of_the_engine(server, tab, tmp_path):
    page = tab()
    page.get_by_label("Use Owl").check()
    fill(page, "prompt", "an owl")
    more(page, steps=5, size="64x64")
    seed(page, 1234)
    got = []
    for name in ("a.png", "b.png"):
        generate(page)
        page.locator("#status .done").wait_for()
        done(page)
        got.append(download(page, tmp_path / name))
        page.evaluate("document.querySelector('#status .done').remove()")  # so that the next one is waited for
    assert got[0].read_bytes() == got[1].read_bytes()
    made = server.engine.run(record.read(got[0])).images[0]
    with Image.open(got[0]) as image:
        assert image.tobytes() == made.tobytes()
    assert len({path.read_bytes() for path in got} & {path.read_bytes() for path in server.pictures.glob("*.png")}) == 1


def test_cancelled_in_one_tab_the_other_tab_has_its_picture(server, tab):
    a, b = tab(), tab()
    more(a, steps=LONG)
    fill(a, "prompt", "a fox")
    generate(a)
    running(a)
    more(b, steps=3)
    fill(b, "prompt", "an owl")
    generate(b)
    b.get_by_text("Waiting: 1 before this one.").wait_for()
    a.locator("#cancel").click()
    a.locator("#status .cancelled").wait_for()
    assert a.locator("#picture").count() == 0
    done(b)
    fill(a, "steps", 2)
    generate(a)
    done(a)


def test_a_closed_tab_takes_its_job_with_it(server, tab):
    a, b = tab(), tab()
    fill(a, "prompt", "a fox")
    more(a, steps=LONG)
    generate(a)
    running(a)
    fill(b, "prompt", "an owl")
    more(b, steps=2)
    generate(b)
    b.get_by_text("Waiting: 1 before this one.").wait_for()
    a.close()
    done(b)


@pytest.mark.parametrize(("values", "said"), [
    ({"size": "63x63"}, "Size 63x63: width and height must be multiples of 8; 64x64 is the nearest"),
    ({"size": "big"}, "Size big: write WIDTHxHEIGHT"),
    ({"steps": 0}, "Steps: must be at least 1 (given 0)"),
    ({"steps": ""}, "Steps is empty"),
    ({"prompt": " "}, "The prompt is empty: write what to draw"),
])
def test_what_cannot_be_made_is_a_sentence_and_the_form_stays(tab, values, said):
    page = tab()
    fill(page, "prompt", "a fox")
    page.get_by_label("Use Owl").check()
    more(page, **values)
    generate(page)
    page.locator("#status").get_by_role("alert").or_(page.locator("#status .done")).wait_for()
    assert said in page.locator("#status").inner_text()
    assert "Traceback" not in page.locator("body").inner_text()
    assert page.locator("#prompt textarea").input_value() == values.get("prompt", "a fox")
    assert page.get_by_label("Use Owl").is_checked()
    assert page.locator("#generate").is_enabled()


def test_trigger_words_by_chip_and_by_button(tab):
    page = tab()
    prompt = page.locator("#prompt textarea")
    page.get_by_label("Use Raccoon").check()
    page.get_by_label("Add “raccoon” to the prompt").click()
    page.wait_for_function("() => document.querySelector('#prompt textarea').value === 'raccoon'")
    page.get_by_label("Use On the moon").check()
    hint = page.locator("#hint")
    hint.get_by_text("no trigger word of On the moon").wait_for()
    assert "Raccoon" not in hint.inner_text()
    page.locator("#add-words").click()
    page.wait_for_function("() => document.querySelector('#prompt textarea').value === 'raccoon, on the moon'")
    hint.wait_for(state="hidden")
    prompt.fill("a fox")
    hint.get_by_text("Raccoon (raccoon), On the moon (on the moon)").wait_for()


def test_a_methods_options_follow_it_and_are_kept(tab, tmp_path):
    page = tab()
    assert page.locator("#options-merge").count() == 0 or page.locator("#options-merge").is_hidden()
    page.get_by_label("Use Owl").check()
    page.get_by_label("Use Raccoon").check()
    choose_method(page, "Switch")
    page.get_by_text("One LoRA at a time, in turn").wait_for()
    unfold(page, "options-switch")
    fill(page, "option-switch-tau", 2)
    page.keyboard.press("Tab")  # as anybody leaves a field
    choose_method(page, "Composite")
    page.get_by_text("Makes one prediction with each LoRA at every step").wait_for()
    page.locator("#options-switch").wait_for(state="hidden")
    choose_method(page, "Switch")
    page.locator("#options-switch").wait_for()
    page.wait_for_function("() => document.querySelector('#option-switch-tau input').value === '2'")
    more(page, steps=4)
    fill(page, "prompt", "an owl")
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Shift+Enter")
    done(page)
    found = record.details(download(page, tmp_path / "got.png"))
    assert (found.request.method, found.request.options) == ("switch", {"tau": 2})
    assert found.notes["leaders"] == ["owl", "owl", "raccoon", "raccoon"]


def test_markup_in_every_field_of_a_file_is_shown_as_text(server, tab):
    """Each field that a LoRA file may have, its name, and the reason why it cannot be used, on the page and in a picture's report."""
    page, alerts = tab(), []
    page.on("dialog", lambda dialog: alerts.append(dialog.message) or dialog.dismiss())
    assert page.locator(".card[data-key=everything] strong").inner_text() == f"All {EVIL}"
    named = page.locator(".card", has=page.locator("strong", has_text="alert(7)"))
    assert named.locator("strong").inner_text() == EVIL_NAME and named.get_attribute("data-key") == EVIL_NAME
    assert page.get_by_label("Use reason").is_disabled() and "window.evil" in page.locator(".card[data-key=reason] small").inner_text()
    for card in (page.locator(".card[data-key=everything]"), named):
        card.locator("input[type=checkbox]").check()
    page.locator("#hint").get_by_text("alert(7)").wait_for()
    page.locator(".lora", has=page.locator("strong", has_text="alert(7)")).locator(".chip").first.click()
    fill(page, "prompt", f"a fox {EVIL}")
    more(page, steps=1, negative=EVIL)
    generate(page)
    done(page)
    assert EVIL_NAME in page.locator("#report").inner_text()
    page.reload()
    page.locator(".card[data-key=everything]").wait_for()
    assert alerts == [] and page.evaluate("window.evil") is None
    assert page.locator("[onerror], [src=x], #loras script, #hint script, #report script, #loras .cards b, #loras .rows b").count() == 0
    inside = page.locator("#loras .loras *").evaluate_all("parts => [...new Set(parts.map(part => part.localName))].sort()")
    assert set(inside) <= {"article", "b", "button", "div", "h2", "img", "input", "label", "option", "p", "select", "small", "span", "strong"}


def test_words_and_pictures_of_files_are_shown_and_never_run(tab):
    page = tab()
    assert page.locator(".card[data-key=evil] strong").inner_text() == EVIL
    assert page.locator(".card[data-key=evil] .letter").count() == 1
    assert page.locator(".card[data-key=pictured] img").get_attribute("src").startswith("data:image/png;base64,")
    assert page.get_by_label("Use broken").is_disabled()
    page.locator(".card[data-key=evil] input[type=checkbox]").check()
    page.locator("#hint").get_by_text("<script>window.evil=3</script>").wait_for()
    fill(page, "prompt", '<img src=x onerror="window.evil=5">')
    more(page, steps=1)
    generate(page)
    assert done(page).get_attribute("alt") == '<img src=x onerror="window.evil=5">'
    assert page.evaluate("window.evil") is None
    assert page.locator("#report img, #status img, #hint img").count() == 0


def test_the_filter_keeps_what_is_chosen_in_sight(tab):
    page = tab(width=400)
    page.get_by_label("Use Raccoon").check()
    page.get_by_label("Filter the LoRAs").fill("tealword")
    assert page.locator(".card:visible").evaluate_all("cards => cards.map(card => card.dataset.key)") == ["pictured"]
    assert page.locator(".lora:visible").evaluate_all("rows => rows.map(row => row.dataset.key)") == ["raccoon"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_what_the_prompt_calls_for_is_suggested(tab):
    """With the reason; a click takes it, with its trigger word. (The library is read by a thread of its own: until then nothing is suggested.)"""
    page = tab()
    chips, prompt = page.locator(".suggested .chip"), page.locator("#prompt textarea")
    for number in range(60):
        prompt.fill(f"a dragon in a neon city{'.' * (number % 2)}")
        page.wait_for_timeout(1000)
        if chips.count() == 2:
            break
    titles = page.locator(".suggested .chip b")
    assert sorted(titles.all_inner_texts()) == ["Dragon", "Neon night"]
    dragon = page.locator(".suggested .chip", has_text="Dragon")
    assert "the prompt says 'dragon'" in dragon.get_attribute("title")
    dragon.click()
    assert page.get_by_label("Use Dragon", exact=True).is_checked() and titles.all_inner_texts() == ["Neon night"]
    chips.click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('neon lights')")
    prompt.fill("a submarine")
    page.wait_for_function("document.querySelector('.suggested').childElementCount === 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_light_and_dark(tab, scheme):
    """Contrast of every kind of text on the page against what lies behind it, by WCAG: 4.5 and more."""
    page = tab(color_scheme=scheme)
    page.get_by_label("Use Raccoon").check()
    more(page, size="63x63")
    generate(page)
    page.get_by_role("alert").wait_for()
    found = page.evaluate("""() => {
      const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const paint = (colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
          const part = value / 255; return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4; });
      };
      const light = (colours) => { const [r, g, b] = paint(colours); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const kinds = ["#title h1", "#title p", ".card strong", ".card small", ".chip", ".count", "#hint", "#status .error",
                     ".stage span", "#method-about p", "#generate", ".controls h2", ".controls .none", ".controls .drop"];
      return kinds.map((kind) => {
        const layers = [];
        for (let part = document.querySelector(kind); part; part = part.parentElement)
          layers.unshift(getComputedStyle(part).backgroundColor);
        layers.unshift("white");
        const [a, b] = [light(layers), light([...layers, getComputedStyle(document.querySelector(kind)).color])].sort((x, y) => x - y);
        return [kind, (b + 0.05) / (a + 0.05)];
      });
    }""")
    assert [(kind, ratio) for kind, ratio in found if ratio < 4.5] == []
