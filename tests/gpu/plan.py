"""The parts of the measurement, in order of importance: what each shows, how long it may take, and its chapters.

Nothing heavy is imported here: the command that starts the chapters stays light, and each chapter is a process of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """seconds: what it may take. chapters: name to (module of this package, share of the seconds)."""

    title: str
    seconds: float
    chapters: Mapping[str, tuple[str, float]]


PARTS: Mapping[str, Part] = {
    "a": Part("every method and every way of offloading, on the bundled models", 120, {
        "methods": ("pictures", 0.6), "offloading": ("offloading", 0.4)}),
    "b": Part("true sizes, random weights, bf16: one evaluation with K LoRAs over the bare base", 230, {
        "eager": ("true_sizes", 0.5), "compiled": ("compiled", 0.5)}),
    "c": Part("what a step of Composite, CMLoRA and CLoRA fast costs over Merge's, three LoRAs", 50, {"steps": ("steps", 1.0)}),
    "d": Part("the trainer: K adapters at once on Pocket's UNet, 16 rows each", 40, {"training": ("trainer", 1.0)}),
    "e": Part("quantised bases with two LoRAs", 60, {"quantised": ("quantised", 1.0)}),
    "f": Part("conditions on FLUX's width, one and two: three ways to read them over the plain evaluation", 40, {"conditions": ("conditions", 1.0)}),
}


def limits(parts: Sequence[str], total: float | None, own: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each part: its own where given; of `total`, what those leave is shared by weight; else the plan's."""
    shared = [part for part in parts if part not in own]
    scale = 1.0
    if total is not None and shared:
        left = total - sum(own[part] for part in parts if part in own)
        scale = max(left, 0.0) / sum(PARTS[part].seconds for part in shared)
    return {part: own.get(part, PARTS[part].seconds * scale) for part in parts}
