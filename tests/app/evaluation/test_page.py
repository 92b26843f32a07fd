"""The report in a real browser: opened from the disk, it fetches nothing, sorts, filters, and shows every picture's request."""

import json

import pytest

from tests.app.evaluation.conftest import rows


@pytest.fixture
def opened(evaluate, browser, tmp_path):
    """The report of a small grid of two sizes, in a tab that must neither fetch nor fail."""
    bed = {"character": [{"id": "fox", "trigger": ["foxword"]}, {"id": "owl", "trigger": ["owlword"]}], "style": [{"id": "ink", "trigger": ["ink drawing"]}]}
    (tmp_path / "bed.json").write_text(json.dumps(bed))
    said = evaluate("--methods", "merge,switch", "--seeds", 2, "--tune", "none", "--no-equal", "--report", "r",
                    source=("--testbed", "bed.json"), loras="1,2")
    assert said.code == 0, said.err
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page, strays, errors = context.new_page(), [], []
    page.on("request", lambda request: strays.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "r/index.html").as_uri())
    yield page
    assert not strays and not errors
    context.close()


def test_tables_sort_by_a_click_and_by_the_keyboard(opened):
    table = opened.locator("table.sortable").first
    head = table.locator("thead th", has_text="CLIPScore").first
    column = head.evaluate("cell => cell.cellIndex")
    values = lambda: table.locator("tbody tr").evaluate_all(f"rows => rows.map(row => Number(row.cells[{column}].dataset.value))")  # noqa: E731
    head.click()
    assert values() == sorted(values(), reverse=True) and head.get_attribute("aria-sort") == "descending"
    head.press("Enter")
    assert values() == sorted(values()) and len(set(values())) > 1


def test_the_grid_sorts_and_filters(opened, tmp_path):
    shown = lambda: opened.locator("#grid tbody tr:visible").evaluate_all("rows => rows.map(row => row.cells[0].textContent)")  # noqa: E731
    assert len(shown()) == 8  # fox, owl, fox+ink, owl+ink, two seeds each
    opened.select_option("#size", "2")
    assert len(shown()) == 4 and all("2 LoRAs" in row for row in shown())
    opened.select_option("#size", "")
    opened.select_option("#sort", "clipscore/merge")
    cells = opened.locator("#grid td[data-variant=merge]").evaluate_all("cells => cells.map(cell => Number(cell.dataset.clipscore))")
    assert cells == sorted(cells) == sorted(row["clipscore"] for row in rows(tmp_path / "r") if row["variant"] == "merge")


def test_every_picture_opens_with_its_request(opened, tmp_path):
    found = {row["id"]: row for row in rows(tmp_path / "r")}
    tiles = opened.locator("#grid .tile")
    assert tiles.count() == len(found) == 24
    for index in (0, 1, 23):
        name = tiles.nth(index).get_attribute("data-id")
        tiles.nth(index).click()
        dialog = opened.locator("#detail")
        assert json.loads(dialog.locator(".request").inner_text()) == found[name]["request"]
        assert dialog.locator("a").get_attribute("href") == found[name]["picture"] and (tmp_path / "r" / found[name]["picture"]).is_file()
        assert dialog.locator("img").evaluate("image => image.naturalWidth") > 0
        dialog.get_by_role("button", name="Close").click()
        assert not dialog.is_visible()


def test_charts_show_every_way_with_its_interval(opened):
    chart = opened.locator(".charts figure", has_text="CLIPScore").first
    titles = chart.locator("title").evaluate_all("found => found.map(one => one.textContent)")
    assert len(titles) == 6 and sum(" to " in title for title in titles) == 6
    assert {title.partition(",")[0] for title in titles} == {"Prompt only", "Merge", "Switch"}


def test_it_can_be_read_on_a_narrow_screen(opened):
    opened.set_viewport_size({"width": 400, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth <= 400")
