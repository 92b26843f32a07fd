"""How strongly LoRAs change each block of a model, drawn: a group of bars for each block, a colour for each LoRA."""

from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw

from app.drawing.palette import FAINT, INK, PALETTE, PAPER
from app.drawing.strip import font as lettering
from composition.loras.conflicts import Strength

WIDE, LEFT, RIGHT, TOP, BAR, GAP = 900, 130, 110, 20, 11, 9
MOST, LETTERS = len(PALETTE), 105


def plot(strengths: Sequence[Strength], sentence: str = "") -> Image.Image:
    """Bars of |dW| by block; of more LoRAs than there are colours the first."""
    shown = strengths[:MOST]
    blocks = list(dict.fromkeys(block for strength in shown for block in strength.blocks))
    lines = wrap(sentence, LETTERS)
    top = TOP + 22 * len(shown) + 17 * len(lines) + 14
    sheet = Image.new("RGB", (WIDE, top + len(blocks) * (BAR * len(shown) + GAP) + TOP), PAPER)
    pen, font, small = ImageDraw.Draw(sheet), lettering(15), lettering(12)
    longest = max((length for strength in shown for length in strength.blocks.values()), default=0.0) or 1.0
    for index, strength in enumerate(shown):
        y = TOP + 22 * index
        pen.rectangle([LEFT, y + 4, LEFT + 16, y + 14], PALETTE[index])
        pen.text((LEFT + 24, y), f"{strength.name[:60]}: strength {strength.length:.3g}", INK, font)
    pen.multiline_text((LEFT, TOP + 22 * len(shown)), "\n".join(lines), FAINT, small)
    for row, block in enumerate(blocks):
        y = top + row * (BAR * len(shown) + GAP)
        pen.text((8, y + BAR * len(shown) / 2 - 8), block[:16], INK, small)
        for index, strength in enumerate(shown):
            length = strength.blocks.get(block, 0.0)
            end = LEFT + length / longest * (WIDE - LEFT - RIGHT)
            pen.rectangle([LEFT, y + index * BAR, max(end, LEFT + 1), y + (index + 1) * BAR - 2], PALETTE[index])
            pen.text((end + 6, y + index * BAR - 3), f"{length:.3g}", FAINT, small)
    return sheet
