"""Numbers that no training leaves in a LoRA: lawful, finite, and all the same likely to end in a black picture.

A factor of a trained LoRA is rarely over 10, and alpha / rank rarely over 4. In half precision nothing above 65504 exists, so that
what is far above the usual soon makes infinities, and those make a black picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

MOST_FACTOR = 1000.0  # the largest absolute value of a factor that passes without a word
MOST_SCALE = 1000.0  # of alpha / rank
MOST_UPDATE = 1000.0  # of the product of all three, which bounds what one rank adds to a weight


class Sizes(NamedTuple):
    """Of one module: its name, the largest absolute values of its factors, its alpha and rank."""

    module: str
    down: float
    up: float
    alpha: float
    rank: int

    @property
    def scale(self) -> float:
        return abs(self.alpha) / self.rank if self.rank else 0.0


def remarks(modules: Sequence[Sizes]) -> tuple[str, ...]:
    """What a user should know of a file's numbers before a picture is made with them; () for those that training leaves."""
    lines = []
    if factors := [module for module in modules if max(module.down, module.up) > MOST_FACTOR]:
        worst = max(factors, key=lambda module: max(module.down, module.up))
        lines.append(f"suspicious: factors up to {max(worst.down, worst.up):.6g} in {_where(factors, worst)}, where training leaves none over 10")
    if scales := [module for module in modules if module.scale > MOST_SCALE]:
        worst = max(scales, key=lambda module: module.scale)
        lines.append(f"suspicious: alpha {worst.alpha:.6g} at rank {worst.rank} in {_where(scales, worst)}, where alpha is rarely over 4 times the "
                     "rank")
    rest = [module for module in modules if module not in factors and module not in scales and _update(module) > MOST_UPDATE]
    if rest:
        worst = max(rest, key=_update)
        lines.append(f"suspicious: updates up to {_update(worst):.6g} in {_where(rest, worst)}, where a weight is rarely over 10")
    return (*lines[:-1], f"{lines[-1]}: the picture may come out black or as noise; try a much smaller weight, or get the file "
            "anew") if lines else ()


def _update(module: Sizes) -> float:
    return module.down * module.up * module.scale


def _where(modules: Sequence[Sizes], worst: Sizes) -> str:
    return f"{len(modules)} module{'s' * (len(modules) > 1)} (as {worst.module:.100})"
