"""What a picture will cost: seconds by steps, evaluations and pixels, at the speed that this machine has shown.

An evaluation's seconds are measured for a size of picture and carried over to other sizes: to smaller ones with their pixels, to
larger ones with the power GROWTH of them, since attention takes the square and the rest of a denoiser does not.
"""

import ast
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

from composition import Refused, Request, methods

if TYPE_CHECKING:
    from composition import Engine

GROWTH = 1.4  # Pocket on a processor: 14 times the seconds for 16 times the pixels, 141 times for 64 times
LONGEST = 30 * 60.0  # seconds of one picture of the page, where its user says nothing


class Meter:
    """Seconds per evaluation by pixels of a picture. longest: seconds that a picture may take."""

    def __init__(self, longest: float = LONGEST) -> None:
        self.longest = longest
        self._seconds: dict[int, float] = {}

    def learn(self, pixels: int, evaluations: float, times: Sequence[float]) -> None:
        """times: when each step of a picture ended, in seconds; evaluations: of each step. The first step is left out: it warms up."""
        if len(times) > 1 and evaluations > 0:
            self._seconds[pixels] = (times[-1] - times[0]) / (len(times) - 1) / evaluations

    def estimate(self, steps: int, evaluations: float, pixels: int) -> float | None:
        """Seconds of such a picture; None where nothing was measured yet."""
        if not self._seconds:
            return None
        near = max((known for known in self._seconds if known <= pixels), default=min(self._seconds))
        ratio = pixels / near
        return steps * evaluations * self._seconds[near] * ratio ** (GROWTH if ratio > 1 else 1.0)

    def check(self, request: Request, engine: "Engine") -> None:
        """Raises Refused, with the estimate, for a picture that would take too long."""
        from composition import starting

        each, seconds = evaluations(request), None
        for part in starting.passes(request.settled(*engine.backbone.defaults), engine.backbone):
            (width, height), steps = engine.backbone.size(part.whole), part.shown.length
            if (more := self.estimate(steps, each, width * height)) is not None:
                seconds = (seconds or 0.0) + more
        if seconds is not None and seconds * request.count > self.longest:
            raise Refused(f"{steps} steps of {each:g} evaluations at {width}x{height} would take about {spoken(seconds * request.count)} on this machine, and "
                          f"a picture may take {spoken(self.longest)}: use a smaller size or fewer steps, or start medley ui with a higher "
                          "--longest")


def evaluations(request: Request) -> float:
    """Evaluations of each step, at most, as the method's cost says: 1, or about one for each LoRA and one besides."""
    cost = methods.find(request.method).cost
    if "K" not in cost:
        return 1.0
    return float(max(1, len(request.loras) + (cost != "K")))


def expected(cost: str, loras: int) -> float:
    """Evaluations of a step as a method's cost says, where it is a sum such as "about 1 + (K - 1) / 3", with so many LoRAs for K; 1 where it is
    none."""
    names, operators = {"K": float(loras)}, {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return operators[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.Name):
            return names[node.id]
        raise ValueError(cost)

    try:
        return value(ast.parse(cost.removeprefix("about ").strip(), mode="eval").body)
    except (SyntaxError, KeyError, ValueError, ZeroDivisionError):
        return 1.0


def spoken(seconds: float) -> str:
    """So many seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours" if seconds < 3e5 else f"{seconds / 86400:.0f} days"
