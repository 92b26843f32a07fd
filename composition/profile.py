"""A LoRA's frequency profile: how H of the latent moves while it draws, over what the base does (arXiv 2502.04923, section 3).

Two numbers, each over the first 60 % of the steps, less the same of the base for the same prompt and noise, mean over seeds:
change is the mean of |H(t + 0.1 T) - H(t)|, the paper's; level is the mean of H(t). They may disagree: H falls while a picture is
drawn, so a LoRA that keeps it high (a line drawing) changes it less, and one that ends smooth (a black sky) more.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from composition import frequency
from composition.engine import Engine
from composition.request import Lora, Refused, Request, explain

SPAN, EARLY = 0.1, 0.6  # of the steps: between which H is compared, and over which
STEPS, SEEDS = 50, 4


@dataclass(frozen=True)
class Profile:
    """high, base: H after each step with the LoRA and without, mean over seeds. change: see above. prompt: what was drawn."""

    name: str
    tensor_sha256: str
    model: str
    prompt: str
    steps: int
    seeds: int
    high: tuple[float, ...]
    base: tuple[float, ...]
    change: float

    @property
    def level(self) -> float:
        """How much higher H is with the LoRA than without, mean over the early steps."""
        early = max(1, int(EARLY * len(self.high)))
        return (sum(self.high[:early]) - sum(self.base[:early])) / early

    def json(self) -> str:
        return _PROFILE.dump_json(self).decode()

    @staticmethod
    def read(text: str | bytes) -> "Profile":
        """Raises Refused for what is none."""
        try:
            return _PROFILE.validate_json(text)
        except ValidationError as error:
            raise Refused(f"not a frequency profile: {explain(error)}") from None


_PROFILE = TypeAdapter(Profile)


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
    with_it = Request(prompt=words, loras=[lora], model=engine.name, steps=steps, count=seeds)
    done, courses = 0, []
    for request in (with_it, replace(with_it, loras=())):
        series: dict[int, list[float]] = {}

        def seen(event, series=series) -> None:
            nonlocal done
            done += 1
            for place, h in enumerate(frequency.high(event.latents).tolist()):
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


def ordered(profiles: Mapping[str, Profile], by: str = "change") -> tuple[list[str], list[str]]:
    """(all names by falling frequency, those of low frequency). by: "change" or "level".

    Low is who is at or under the base; where none is, of three LoRAs or more the last. All low is none low.
    """
    values = {name: getattr(profile, by) for name, profile in profiles.items()}
    names = sorted(values, key=lambda name: -values[name])
    low = [name for name in names if values[name] <= 0] or (names[-1:] if len(names) >= 3 else [])
    return names, [] if len(low) == len(names) else low
