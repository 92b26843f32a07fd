"""CMLoRA: one LoRA is dominant at a time, by its frequency; the others use cached features (arXiv 2502.04923).

The prediction is the mean over LoRAs of weight * prediction. High-frequency LoRAs are dominant early, low-frequency ones late; another
one becomes dominant at refresh steps. The dominant LoRA is evaluated in full at every step; the others from their slots, refreshed when
too old and at the change of phase. `reference` does what the authors' released code does where it differs from this: constant weights,
the phase at step 120, the dominant LoRA in full only when it has just become so, nothing refreshed late. All evaluations of a step
(two with Heun's method) have the same weights, and the same LoRAs in full.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from composition.hooks import cache as caches
from composition.hooks.cache import Cache
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import dominance, spectrum
from composition.run import Run

REFERENCE_BOUNDARY = 120  # the step at which the released code changes phase, however many there are
CALM = 3  # steps in a row under the threshold that end the early phase when it is found online


@dataclass(frozen=True)
class Options:
    order: str = field(default="", metadata={
        "help": "LoRAs by falling frequency, separated by commas, the others after them by category (character first); or change or "
        "level: as measured; category: by category alone; empty: as measured where all were."})
    low: str = field(default="", metadata={"help": "LoRAs of low frequency, which are dominant late; empty: places; none: no LoRA."})
    boundary: float = field(default=0.6, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the steps after which low-frequency LoRAs are dominant."})
    low_only: bool = field(default=False, metadata={"help": "Late, only low-frequency LoRAs are dominant, not all but the first."})
    every: int = field(default=0, metadata={"ge": 0, "le": 1000, "help": "Steps between refreshes; 0: 2, in the middle 3."})
    dominance: bool = field(default=True, metadata={"help": "Give the dominant LoRA a larger weight; without, all weigh the same."})
    decay: bool = field(default=True, metadata={"help": "Let the dominant LoRA's larger weight decay."})
    cache: bool = field(default=True, metadata={"help": "Use cached features for the LoRAs that are not dominant; without, evaluate all in full."})
    max_age: int = field(default=6, metadata={"ge": 0, "le": 1000, "help":
        "Steps after which cached features are refreshed; 0: at every step."})
    others_weight: float = field(default=0.0, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of its weight that every other LoRA keeps in each LoRA's pass; 0, as the paper has it: it is alone."})
    online: bool = field(default=False, metadata={"help": "End the early phase by the latent's own frequency, not at the boundary."})
    threshold: float = field(default=0.4, metadata={"ge": 0.0, "le": 1.0, "help": "The frequency that ends it, when online."})
    reference: bool = field(default=False, metadata={"help": "Do what the authors' released code does."})


@method(title="CMLoRA", about="One LoRA is dominant at a time, by its frequency; the others use cached features.", paper="2502.04923",
        cost="about 1 + (K - 1) / 3", symmetric=False)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    with ExitStack() as stack:
        cache = caches.of(run.backbone.denoiser)
        caching = options.cache and cache.usable and len(run.names) > 1
        if caching:
            stack.enter_context(cache.attached())
        yield _Course(run, options, cache if caching else None).predict


class _Course:
    """The state of one run: which LoRA is dominant, how old the slots are, which phase it is."""

    def __init__(self, run: Run, options: Options, cache: Cache | None) -> None:
        self.run, self.options, self.cache = run, options, cache
        self.high, self.low = dominance.ordered(run.names, run.categories, options.order, options.low, known=run.request.names)
        self.turn = 0
        self.dominant = ""
        self.weights: dict[str, float] = {}
        self.late = False
        self.calm = 0
        self.ages: dict[str, int] = {}
        self.full: set[str] = set()
        self.history: dict[str, list[Any]] = {"leaders": [], "phase": [], "full": [], "ages": [], "H": [], "weight": []}
        run.notes["cmlora"] = {"high": list(self.high), "low": list(self.low), **self.history}

    def predict(self, step: Step) -> Prediction:
        live = self.run.live(step)
        if not live:
            return Prediction(self.run.guide(self.run.denoise(step)), step.latents)
        if step.stage == 0:
            self._begin(step, live)
        passes = self.run.passes(step, others_weight=self.options.others_weight)
        parts = self.run.denoise_passes(step, passes, cache=self.cache, full=self.full)
        weight = parts.new_tensor([self.weights[name] for name in live]).view(-1, *[1] * (parts.ndim - 1))
        return Prediction(self.run.guide((parts * weight).mean(0)), step.latents)

    def _begin(self, step: Step, live: dict[str, float]) -> None:
        """What holds for all evaluations of a step."""
        h = float(spectrum.high(step.latents[:1])[0])
        changed = self._phase(step, h)
        refreshed = step.index in dominance.refreshes(step.count, self.options.every) or set(live) != set(self.weights)
        if refreshed:
            self._refresh(*dominance.among(live, self.high, self.low))
        self.full = self._in_full(live, refreshed, changed)
        self.ages = {name: 0 if name in self.full else self.ages.get(name, 0) + 1 for name in live}
        self._note(live, h)

    def _phase(self, step: Step, h: float) -> bool:
        """Whether the late phase begins at this step."""
        options, before = self.options, self.late
        self.calm = self.calm + 1 if h < options.threshold else 0
        if not self.low:
            return False
        if options.online:
            self.late = self.late or self.calm >= CALM
        elif options.reference:
            self.late = step.index > REFERENCE_BOUNDARY
        else:
            self.late = step.index >= options.boundary * step.count
        return self.late and not before

    def _refresh(self, high: tuple[str, ...], low: tuple[str, ...]) -> None:
        """The next dominant LoRA, and everyone's weight."""
        names, options = (*high, *low), self.options
        self.dominant = dominance.leader(high, low, self.turn, late=self.late, low_only=options.low_only)
        c = dominance.coefficient(len(names), self.turn, decay=options.decay and not options.reference)
        self.weights = dominance.weights(names, self.dominant, c if options.dominance else 1.0)
        self.turn += 1

    def _in_full(self, live: dict[str, float], refreshed: bool, changed: bool) -> set[str]:
        """The LoRAs that are evaluated in full at this step."""
        if self.cache is None:
            return set(live)
        empty = {name for name in live if not self.cache.has(name)}
        if self.options.reference:
            return empty | ({self.dominant} if refreshed and not self.late else set())
        old = {name for name in live if self.ages.get(name, 0) + 1 > self.options.max_age}
        return set(live) if changed else empty | old | {self.dominant}

    def _note(self, live: dict[str, float], h: float) -> None:
        self.history["leaders"].append(self.dominant)
        self.history["phase"].append("late" if self.late else "early")
        self.history["full"].append([name for name in live if name in self.full])
        self.history["ages"].append([self.ages[name] for name in live])
        self.history["H"].append(round(h, 4))
        self.history["weight"].append(round(self.weights[self.dominant], 4))


def timeline(notes: dict[str, Any]) -> list[str]:
    """A run's notes as lines, a letter a step: # dominant, + in full, . from the cache; and the phase."""
    history = notes["cmlora"]
    names = [*history["high"], *history["low"]]
    wide = max((len(name) for name in [*names, "phase"]), default=5)
    rows = [("phase", "".join("e" if phase == "early" else "l" for phase in history["phase"]))]
    for name in names:
        letters = "".join("#" if dominant == name else "+" if name in full else "."
                          for dominant, full in zip(history["leaders"], history["full"], strict=True))
        rows.append((name, letters))
    return [f"{name:<{wide}}  {letters}" for name, letters in rows]
