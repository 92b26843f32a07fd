"""AutoLoRA's gates as a heat map: for each LoRA the layers from top to bottom and the steps from left to right."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from app.drawing.palette import FAINT, INK, PAPER
from app.drawing.strip import font as lettering

WIDE, HIGH = 260, 280  # pixels of a LoRA's panel, about
THIN, THICK = 4, 16  # a layer's height at least and at most
LINE = 12  # of the small letters
LEFT, TOP, GAP, BOTTOM = 120, 52, 14, 48
LESS, MORE = (0, 114, 178), (213, 94, 0)  # gates under 1 and over it; 1 is white
SPAN = 1.0  # from 1 to the deepest colour


def colour(gate: float) -> tuple[int, ...]:
    """White at 1, deeper blue towards 0, deeper orange towards 2 and beyond."""
    share = min(1.0, abs(gate - 1) / SPAN)
    return tuple(round(255 + share * (end - 255)) for end in (LESS if gate < 1 else MORE))


def height(layers: int) -> int:
    """Pixels that one of so many layers is high."""
    return max(THIN, min(THICK, HIGH // max(1, layers)))


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
    cell = height(len(layers))
    sheet = Image.new("RGB", (LEFT + len(loras) * (WIDE + GAP), TOP + cell * len(layers) + BOTTOM), PAPER)
    pen, font = ImageDraw.Draw(sheet), lettering(14)
    pen.text((8, 6), f"how far each LoRA is let through by the {len(layers)} gated layers (down) at each step (across)", INK, font)
    for number, name in enumerate(loras):
        left = LEFT + number * (WIDE + GAP)
        mine = gates.get(name, {})
        mean = sum(mine.values()) / len(mine) if mine else 1.0
        pen.text((left, 28), f"{name[:20]}  mean {mean:.2f}", INK, font)
        for row, path in enumerate(layers):
            for place in range(len(steps)):
                ends = [left + WIDE * at // len(steps) for at in (place, place + 1)]
                shade = colour(mine[path, place]) if (path, place) in mine else (238, 238, 238)
                pen.rectangle((ends[0], TOP + cell * row, ends[1] - 1, TOP + cell * row + cell - 1), shade)
        numbers = [int(step.get("step", place)) + 1 for place, step in enumerate(steps)]
        pen.text((left, sheet.height - BOTTOM + 1), f"step {numbers[0]}", FAINT, lettering(10))
        pen.text((left + WIDE, sheet.height - BOTTOM + 1), f"{numbers[-1]}", FAINT, lettering(10), anchor="ra")
    previous, free = "", 0
    for row, path in enumerate(layers):
        first, *rest = path.split(".")
        block = ".".join([first, *(word for word in rest[:1] if word.isdigit())])
        if block != previous and TOP + cell * row >= free:
            pen.text((8, TOP + cell * row), block[:18], FAINT, lettering(10))
            free = TOP + cell * row + LINE
        previous = block
    most = max(value for own_gates in gates.values() for value in own_gates.values())
    for number, gate in enumerate((0.0, 0.5, 1.0) if most <= 1 else (0.0, 0.5, 1.0, 1.5, 2.0)):
        x = LEFT + 60 * number
        pen.rectangle((x, sheet.height - 26, x + 18, sheet.height - 10), colour(gate), FAINT)
        pen.text((x + 24, sheet.height - 27), f"{gate:g}", FAINT, font)
    return sheet
