"""Art for tests: a coloured square for every emoji the world draws, laid out as the stage `art` leaves it."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from assets.recipe.art import ART, NAMES, own


def draw(folder: Path, vendors=tuple(ART), more=()) -> Path:
    """more: (code point, label) of further emoji, which the judge learns, too."""
    for index, code in enumerate([*own(), *(code for code, _ in more)]):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        ImageDraw.Draw(image).rectangle((6, 6, 57, 57), fill=((index * 37) % 256, (index * 91) % 256, (index * 53) % 256, 255))
        for vendor in vendors:
            file = folder / ART[vendor].format(code)
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, **({"lossless": True} if file.suffix == ".webp" else {}))
    names = folder / NAMES
    names.parent.mkdir(parents=True, exist_ok=True)
    names.write_text(json.dumps([{"label": label, "hexcode": code.upper(), "group": 3, "tags": ["thing"]} for code, label in more]))
    return folder
