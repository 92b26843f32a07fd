"""Content and style: the two roles that methods for a subject in a style have, taken from the LoRAs' categories.

A style LoRA has the role style; a LoRA of any other category, and one of none, the role content. There may be several of each.
"""

from collections.abc import Collection

from composition.run import Run

STYLE = "style"


def parted(run: Run, names: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(content, style) of these LoRAs, each in the order given."""
    style = tuple(name for name in names if run.categories.get(name) == STYLE)
    return tuple(name for name in names if name not in style), style
