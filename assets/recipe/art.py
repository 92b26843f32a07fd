"""The art stage: vector emoji rendered at a size fit for the pictures, in the layout that the world reads.

Noto and Twemoji come as SVG in npm packages of Iconify, Fluent as rendered pictures. resvg renders the SVG; nothing else of
the recipe needs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .objects import HELD_OBJECTS, OBJECTS, WORN

NAMES = "emojibase-data/en/data.json"  # labels, tags and groups of every emoji; the same place in the packages and in the art
ART = {"noto": "noto/{}.png", "twemoji": "twemoji/{}.png", "fluent": "fluent/{}.webp"}  # a code point's picture by each vendor
VECTOR = {"noto": "@iconify-json/noto", "twemoji": "@iconify-json/twemoji"}
RENDERED = "@lobehub/fluent-emoji-3d/assets"
GROUPS = (3, 4, 5, 6, 7)  # animals, food, travel, activities, things: of emojibase's groups
FINER = 1.25  # side of the art over the side of the pictures; the largest object is 0.8 of a picture


def own() -> list[str]:
    """Code points of everything the world can draw."""
    return [*OBJECTS.values(), *HELD_OBJECTS.values(), *(worn.code for worn in WORN.values())]


def spellings(code: str) -> tuple[str, str]:
    """A code point may carry the variation selector in file names and tables."""
    return code, f"{code}-fe0f"


def codes(packages: Path) -> list[str]:
    """The world's own code points, then those of all groups that the judge's further names are of."""
    data = json.loads((packages / NAMES).read_text())
    further = (entry["hexcode"].lower().removesuffix("-fe0f") for entry in data if entry.get("group") in GROUPS)
    return list(dict.fromkeys([*own(), *further]))


def drawings(package: Path, wanted: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(code point, SVG) of those the Iconify package has."""
    held: dict[str, Any] = json.loads((package / "icons.json").read_text())
    names = json.loads((package / "chars.json").read_text())
    for code in wanted:
        name = next((names[spelled] for spelled in spellings(code) if spelled in names), None)
        if name is None:
            continue
        icon = held["icons"].get(name) or held["icons"][held["aliases"][name]["parent"]]
        wide, high = (icon.get(side, held.get(side, 16)) for side in ("width", "height"))
        wide, high = max(wide, high), max(wide, high)  # both sets are square; some packages leave the width out
        yield code, (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{wide}" height="{high}" '
                     f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {wide} {high}">{icon["body"]}</svg>')  # fmt: skip


def make(packages: Path, folder: Path, size: int) -> None:
    """Render the art for pictures of ``size`` pixels a side from the npm packages into ``folder``; it appears whole or not at all."""
    import resvg_py

    side, wanted = round(size * FINER), codes(packages)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for vendor, package in VECTOR.items():
        (part / vendor).mkdir(parents=True)
        for code, drawing in drawings(packages / package, wanted):
            picture = resvg_py.svg_to_bytes(svg_string=drawing, width=side, height=side)
            (part / ART[vendor].format(code)).write_bytes(bytes(picture))
    (part / "fluent").mkdir()
    for code in wanted:
        files = [packages / RENDERED / f"{spelled}.webp" for spelled in spellings(code)]
        for file in files:
            if file.is_file():
                picture = Image.open(file).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
                picture.save(part / ART["fluent"].format(code), quality=95)
                break
    (part / NAMES).parent.mkdir(parents=True)
    shutil.copyfile(packages / NAMES, part / NAMES)
    part.rename(folder)
