"""A strip: pictures side by side in one, each with a label under it."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from app.drawing.palette import FAINT, INK, PAPER

TILE = 256  # pictures smaller than this are enlarged, so that labels can be read
COLUMNS = 6
GAP = 12


def strip(pictures: Sequence[tuple[Image.Image, str, str]], caption: str = "") -> Image.Image:
    """One picture of all `pictures` (each with a label and a fainter second line), `caption` above them."""
    if not pictures:
        raise ValueError("a strip needs at least one picture")
    wide = max(picture.width for picture, *_ in pictures)
    high = max(picture.height for picture, *_ in pictures)
    scale = max(1, -(-TILE // min(wide, high)))
    wide, high = wide * scale, high * scale
    large, small = font(max(18, wide // 14)), font(max(14, wide // 19))
    columns = min(len(pictures), COLUMNS)
    below = _height(large) + _height(small) + GAP
    head = _height(large) + GAP if caption else 0
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (wide + GAP) + GAP, head + rows * (high + below + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), _fitted(caption, large, sheet.width - 2 * GAP), INK, large)
    for index, (picture, label, second) in enumerate(pictures):
        x = GAP + index % columns * (wide + GAP)
        y = head + GAP + index // columns * (high + below + GAP)
        size = (picture.width * scale, picture.height * scale)
        sheet.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS) if scale > 1 else picture, (x, y))
        pen.text((x, y + high + GAP // 2), _fitted(label, large, wide), INK, large)
        pen.text((x, y + high + GAP // 2 + _height(large)), _fitted(second, small, wide), FAINT, small)
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of labels at this size."""
    return ImageFont.load_default(size)


def _height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(font.getbbox("Ág")[3]) + 4


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or as much of it as fits, with an ellipsis."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
