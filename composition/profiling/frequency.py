"""Measures a LoRA's frequency profile: pictures with it and without, H after each step (`composition.profiles.frequency`)."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from composition import prompt_weights
from composition.engine import Engine
from composition.methods.shared import spectrum
from composition.profiles.frequency import EARLY, Profile
from composition.request import Lora, Request

SPAN = 0.1  # of the steps: between which H is compared
STEPS, SEEDS = 50, 4


def measure(
    engine: Engine, lora: Lora, *, prompt: str = "", steps: int = STEPS, seeds: int = SEEDS,
    on_step: Callable[[int, int], None] | None = None, cancel: threading.Event | None = None,
) -> Profile:  # fmt: skip
    """Draw with the LoRA and without, `seeds` times each. prompt: "" for its first trigger word, else its name.

    on_step: (steps done, of all). Raises Refused as Engine.run does, Cancelled when `cancel` is set.
    """
    receipt = engine.inspect(lora.source)
    triggers = lora.triggers or receipt.triggers
    words = prompt or (triggers[0] if triggers else receipt.title or lora.name.replace("_", " "))
    with_it = Request(prompt=prompt or prompt_weights.escaped(words), loras=[lora], model=engine.name, steps=steps, count=seeds)
    done, courses = 0, []
    for request in (with_it, replace(with_it, loras=())):
        series: dict[int, list[float]] = {}

        def seen(event, series=series) -> None:
            nonlocal done
            done += 1
            for place, h in enumerate(spectrum.high(event.latents).tolist()):
                series.setdefault(event.picture + place, []).append(h)
            if on_step:
                on_step(done, 2 * steps * seeds)

        engine.run(request, on_step=seen, cancel=cancel)
        courses.append([series[picture] for picture in sorted(series)])
    changes = [[change(course) for course in several] for several in courses]
    moved = sum(a - b for a, b in zip(*changes, strict=True)) / len(changes[0])
    high, base = (tuple(sum(values) / len(values) for values in zip(*several, strict=True)) for several in courses)
    return Profile(lora.name, receipt.tensor_sha256, engine.name, words, steps, seeds, high, base, moved)


def change(course: Sequence[float]) -> float:
    """Mean over the early steps of how far H moves in a tenth of all steps."""
    span = max(1, round(SPAN * len(course)))
    early = range(min(max(1, int(EARLY * len(course))), max(1, len(course) - span)))
    moves = [abs(course[t + span] - course[t]) for t in early if t + span < len(course)]
    return sum(moves) / len(moves) if moves else 0.0
