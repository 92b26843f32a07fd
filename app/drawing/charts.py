"""Small charts as SVG: a metric against the number of LoRAs, or by method, with its intervals."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from app.drawing.palette import GREY, PALETTE

ALONE = {"none": GREY, "lora-alone": "currentColor"}  # what methods are compared with, to its colour
ALL = "all"  # the part of a summary that is of every size
WIDE, HIGH = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 30


def colours(variants: Sequence[str]) -> dict[str, str]:
    """A variant's colour; `X@equal` has that of `X`."""
    plain = [variant for variant in variants if variant not in ALONE and "@" not in variant]
    table = {variant: PALETTE[index % len(PALETTE)] for index, variant in enumerate(plain)}
    return {variant: ALONE[variant] if variant in ALONE else table.get(variant.partition("@")[0], PALETTE[-1]) for variant in variants}


def lines(parts: Mapping[str, Any], variants: Sequence[str], titles: Mapping[str, str], metric: Any, unit: str = "LoRAs") -> str:
    """Score against a number, a line a variant, whiskers for its 95 % interval. parts: the number (or "all", which is left out) to its summary.
    unit: what is counted."""
    sizes = sorted(int(name) for name in parts if name != ALL)
    points = {variant: [(size, parts[str(size)]["means"][variant]) for size in sizes if variant in parts[str(size)]["means"]] for variant in variants}
    scale = _Scale([interval for rows in points.values() for _, interval in rows], metric)
    step = (WIDE - LEFT - RIGHT) / max(1, len(sizes))
    place = {size: LEFT + step * (index + 0.5) for index, size in enumerate(sizes)}
    drawn = [*scale.axis(), *(_text(place[size], HIGH - 10, f"{size} {unit}" if size == sizes[0] else str(size), "middle") for size in sizes)]
    table = colours(variants)
    for index, (variant, rows) in enumerate(points.items()):
        shift = (index - (len(variants) - 1) / 2) * min(7.0, step * 0.6 / len(variants))
        dash = ' stroke-dasharray="4 3"' if "@" in variant else ""
        spots = [(place[size] + shift, interval) for size, interval in rows]
        if len(spots) > 1:
            path = " ".join(f"{x:.1f},{scale(interval['mean']):.1f}" for x, interval in spots)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{table[variant]}" stroke-width="1.5"{dash}/>')
        drawn += [_mark(x, interval, scale, table[variant], f"{titles[variant]}, {size} {unit}", metric) for (x, interval), (size, _) in zip(spots, rows, strict=True)]
    return _svg(drawn, f"{metric.title} against the number of {unit}")


def bars(part: Mapping[str, Any], variants: Sequence[str], titles: Mapping[str, str], metric: Any) -> str:
    """The same for pictures of one size: a mark a variant."""
    known = [variant for variant in variants if variant in part["means"]]
    scale, table = _Scale([part["means"][variant] for variant in known], metric), colours(variants)
    step = (WIDE - LEFT - RIGHT) / max(1, len(known))
    drawn = scale.axis()
    for index, variant in enumerate(known):
        x = LEFT + step * (index + 0.5)
        drawn.append(_mark(x, part["means"][variant], scale, table[variant], titles[variant], metric))
        drawn.append(_text(x, HIGH - 10, titles[variant].replace(", equal evaluations", " =")[:13], "middle"))
    return _svg(drawn, f"{metric.title} by method")


class _Scale:
    """Score to height, with room above and below; shares stay in 0..1."""

    def __init__(self, intervals: Sequence[Mapping[str, Any]], metric: Any) -> None:
        self.metric = metric
        ends = [end for interval in intervals for end in (interval["low"], interval["mean"], interval["high"]) if end is not None] or [0.0, 1.0]
        room = 0.08 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 0.5
        self.low, self.high = min(ends) - room, max(ends) + room
        if metric.share or min(ends) >= 0:
            self.low = max(0.0, self.low)
        if metric.share:
            self.high = min(1.0, self.high) if self.low < 1.0 else 1.05

    def __call__(self, value: float) -> float:
        return HIGH - BOTTOM - (value - self.low) / (self.high - self.low) * (HIGH - BOTTOM - TOP)

    def axis(self) -> list[str]:
        drawn = []
        for index in range(5):
            value = self.low + (self.high - self.low) * index / 4
            y = self(value)
            label = f"{100 * value:.0f} %" if self.metric.share else f"{value:.3g}"
            drawn.append(f'<line x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
            drawn.append(_text(LEFT - 6, y + 4, label, "end"))
        return drawn


def _mark(x: float, interval: Mapping[str, Any], scale: _Scale, colour: str, title: str, metric: Any) -> str:
    whisker = ""
    if interval["low"] is not None:
        top, bottom = scale(interval["high"]), scale(interval["low"])
        whisker = (f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}" stroke-width="1.5"/>'
                   + "".join(f'<line x1="{x - 3:.1f}" x2="{x + 3:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>' for y in (top, bottom)))  # fmt: skip
    factor, unit = (100, " %") if metric.share else (1, "")
    ends = "" if interval["low"] is None else f" ({factor * interval['low']:.{metric.digits}f} to {factor * interval['high']:.{metric.digits}f})"
    label = f"{title}: {factor * interval['mean']:.{metric.digits}f}{unit}{ends}"
    return (f'<g>{whisker}<circle cx="{x:.1f}" cy="{scale(interval["mean"]):.1f}" r="3.5" fill="{colour}"/>'
            f"<title>{escape(label)}</title></g>")  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(drawn: Sequence[str], label: str) -> str:
    return (f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(label, quote=True)}">{"".join(drawn)}</svg>')  # fmt: skip
