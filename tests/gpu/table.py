"""The measurement as plain text: a table for each chapter, then its remarks and what failed."""

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any) -> str:
    """Three figures, no exponent for what has a plain form; words as they are; - for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def grid(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines with a column for every name that any row has, in the order in which they first appear."""
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    lines = [["", *names], *([label, *(number(values.get(name)) for name in names)] for label, values in rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    return ["  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]).rstrip()
            for line in lines]


def chapter(name: str, content: Mapping[str, Any], end: str) -> list[str]:
    """One chapter's lines. end: how its process ended ("" as it should)."""
    lines = [f"  {name}, {content.get('seconds', 0):.0f} s" + (f": {end}" if end else "")]
    if content.get("rows"):
        lines += [f"    {line}" for line in grid(content["rows"])]
    lines += [f"    note: {text}" for text in content.get("remarks", [])]
    if skipped := content.get("skipped"):
        lines.append(f"    no time left for: {_listed(skipped)}")
    lines += [f"    FAILED {error['what']}: {error['error']}" for error in content.get("errors", [])]
    return lines


def machine(facts: Mapping[str, Any]) -> str:
    """Device and versions in one line."""
    parts = [str(facts.get("device")), *([f"{facts['GiB']} GiB"] if "GiB" in facts else []), f"{facts.get('cores')} cores",
             f"Python {facts.get('python')}"]
    known = ("device", "GiB", "cores", "python")
    parts += [f"{name} {value or 'not installed'}" for name, value in facts.items() if name not in known]
    return ", ".join(parts)


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
