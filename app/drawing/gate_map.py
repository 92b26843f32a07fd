"""AutoLoRA's gates as a heat map: for each LoRA the layers from top to bottom and the steps from left to right."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from app.drawing.palette import FAINT, INK, PAPER
from app.drawing.strip import font as lettering

CELL, WIDE = 4, 260  # pixels that a layer is high; of a LoRA's panel
LEFT, TOP, GAP, BOTTOM = 120, 52, 14, 40
LESS, MORE = (0, 114, 178), (213, 94, 0)  # gates under 1 and over it; 1 is white
SPAN = 1.0  # from 1 to the deepest colour


def colour(gate: float) -> tuple[int, ...]:
    """White at 1, deeper blue towards 0, deeper orange towards 2 and beyond."""
    share = min(1.0, abs(gate - 1) / SPAN)
    return tuple(round(255 + share * (end - 255)) for end in (LESS if gate < 1 else MORE))


def table(steps: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str], dict[str, dict[tuple[str, int], float]]]:
    """(LoRAs, layers, for each LoRA the gate by layer and place of the step) of the notes of a run; what is no such note is left out."""
    loras: dict[str, None] = {}
    layers: dict[str, None] = {}
    gates: dict[str, dict[tuple[str, int], float]] = {}
    for place, step in enumerate(steps):
        names = [str(name) for name in step.get("loras", ())]
        loras |= dict.fromkeys(names)
        for path, values in step.get("gates", {}).items():
            layers[str(path)] = None
            if len(values) == len(names):
                for name, value in zip(names, values, strict=True):
                    gates.setdefault(name, {})[str(path), place] = float(value)
    return list(loras), list(layers), gates


def heat_map(notes: Mapping[str, Any]) -> Image.Image | None:
    """The picture; None for notes without learned gates."""
    own = notes.get("autolora")
    steps = own.get("steps", ()) if isinstance(own, Mapping) else ()
    loras, layers, gates = table(steps)
    if not gates:
        return None
    sheet = Image.new("RGB", (LEFT + len(loras) * (WIDE + GAP), TOP + CELL * len(layers) + BOTTOM), PAPER)
    pen, font = ImageDraw.Draw(sheet), lettering(14)
    pen.text((8, 6), "gate of each LoRA by layer (down) and step (across)", INK, font)
    for number, name in enumerate(loras):
        left = LEFT + number * (WIDE + GAP)
        mine = gates.get(name, {})
        mean = sum(mine.values()) / len(mine) if mine else 1.0
        pen.text((left, 28), f"{name[:20]}  mean {mean:.2f}", INK, font)
        for row, path in enumerate(layers):
            for place in range(len(steps)):
                ends = [left + WIDE * at // len(steps) for at in (place, place + 1)]
                shade = colour(mine[path, place]) if (path, place) in mine else (238, 238, 238)
                pen.rectangle((ends[0], TOP + CELL * row, ends[1] - 1, TOP + CELL * row + CELL - 1), shade)
    previous = ""
    for row, path in enumerate(layers):
        block = ".".join(path.split(".")[:2])
        if block != previous:
            pen.text((8, TOP + CELL * row - 3), block[:16], FAINT, lettering(10))
            previous = block
    for number, gate in enumerate((0.0, 0.5, 1.0, 1.5, 2.0)):
        x = LEFT + 60 * number
        pen.rectangle((x, sheet.height - 26, x + 18, sheet.height - 10), colour(gate), FAINT)
        pen.text((x + 24, sheet.height - 27), f"{gate:g}", FAINT, font)
    return sheet
