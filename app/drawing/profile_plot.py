"""Frequency profiles drawn: H(t) of every LoRA over the base's."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from app.drawing.palette import FAINT, INK, PALETTE, PAPER
from app.drawing.strip import font as lettering
from composition.profiles.frequency import Profile

WIDE, HIGH = 900, 460
LEFT, RIGHT, TOP, BOTTOM = 80, 270, 40, 60


def plot(profiles: Sequence[Profile]) -> Image.Image:
    """H(t) of every LoRA over the base's, as lines over the share of the steps."""
    if not profiles:
        raise ValueError("a plot needs at least one profile")
    sheet = Image.new("RGB", (WIDE, HIGH), PAPER)
    pen, font = ImageDraw.Draw(sheet), lettering(15)
    courses = {profile.name: [a - b for a, b in zip(profile.high, profile.base, strict=True)] for profile in profiles}
    ends = [value for course in courses.values() for value in course] + [0.0]
    room = 0.1 * (max(ends) - min(ends)) or 0.01
    low, high = min(ends) - room, max(ends) + room

    def spot(share: float, value: float) -> tuple[float, float]:
        return LEFT + share * (WIDE - LEFT - RIGHT), HIGH - BOTTOM - (value - low) / (high - low) * (HIGH - BOTTOM - TOP)

    pen.text((LEFT, 10), f"H(t) with the LoRA, less the base's: {profiles[0].model}, {profiles[0].steps} steps, {profiles[0].seeds} seeds", INK, font)
    for index in range(5):
        value = low + (high - low) * index / 4
        y = spot(0, value)[1]
        pen.line([(LEFT, y), (WIDE - RIGHT, y)], "#dddddd")
        pen.text((8, y - 9), f"{value:+.3f}", FAINT, font)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        pen.text((spot(share, 0)[0] - 15, HIGH - BOTTOM + 8), f"{share:.0%}", FAINT, font)
    pen.text((LEFT, HIGH - 28), "share of the steps", FAINT, font)
    pen.line([spot(0, 0.0), spot(1, 0.0)], "#888888", 2)
    pen.text((WIDE - RIGHT + 40, 10), "change, level", FAINT, font)
    for index, (name, course) in enumerate(courses.items()):
        colour = PALETTE[index % len(PALETTE)]
        points = [spot((step + 1) / len(course), value) for step, value in enumerate(course)]
        pen.line(points, colour, 3, joint="curve")
        y = TOP + 22 * index
        pen.line([(WIDE - RIGHT + 12, y + 9), (WIDE - RIGHT + 34, y + 9)], colour, 3)
        pen.text((WIDE - RIGHT + 40, y), f"{name[:12]} {profiles[index].change:+.3f} {profiles[index].level:+.3f}", INK, font)
    return sheet
