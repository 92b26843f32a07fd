"""The strip: every picture whole, labels inside their tiles."""

import pytest
from PIL import Image, ImageChops

from app.drawing.strip import COLUMNS, GAP, PAPER, TILE, strip


def _plain(colour: str, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def _ink(sheet: Image.Image) -> tuple[int, int, int, int]:
    box = ImageChops.difference(sheet, Image.new("RGB", sheet.size, PAPER)).getbbox()
    assert box
    return box


def test_small_pictures_are_enlarged_and_stand_in_order():
    sheet = strip([(_plain("#ff0000"), "Merge", ""), (_plain("#00ff00"), "Switch", "")])
    assert sheet.getpixel((GAP + TILE // 2, GAP + TILE // 2)) == (255, 0, 0)
    assert sheet.getpixel((2 * GAP + TILE + TILE // 2, GAP + TILE // 2)) == (0, 255, 0)


def test_large_pictures_keep_their_pixels():
    picture = Image.effect_noise((300, 420), 80).convert("RGB")
    sheet = strip([(picture, "one", "")])
    assert ImageChops.difference(sheet.crop((GAP, GAP, GAP + 300, GAP + 420)), picture).getbbox() is None


def test_labels_are_drawn_and_never_leave_the_sheet():
    bare, full = (strip([(_plain(PAPER), label, "")]) for label in ("", "Merge " * 60))
    assert bare.size == full.size
    left, _, right, bottom = _ink(full)
    assert left >= GAP
    assert right <= GAP + TILE
    assert bottom < full.height
    assert ImageChops.difference(bare, full).getbbox()


def test_more_pictures_than_columns_take_a_second_row():
    one, two = (strip([(_plain("#123456"), "x", "y")] * count) for count in (COLUMNS, COLUMNS + 1))
    assert one.width == two.width
    assert two.height > 1.8 * one.height


def test_the_caption_stands_above():
    plain, named = strip([(_plain("#ff0000"), "", "")]), strip([(_plain("#ff0000"), "", "")], caption="a fox")
    assert named.height > plain.height


def test_nothing_to_show():
    with pytest.raises(ValueError, match="at least one"):
        strip([])
