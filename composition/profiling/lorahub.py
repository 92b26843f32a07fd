"""LoraHub for pictures: search for the weights of the LoRAs that maximise a score (arXiv 2307.13269, the image version).

The weights multiply the request's own and act on each LoRA's whole update, W + sum x_i w_i B_i A_i, so that ranks may differ (the
original averages factors, with cross terms). Search begins at x = 1, plain Merge. Reporting the score that was
searched with measures the search and not the pictures: report another score, or other seeds.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from composition.engine import Engine
from composition.refusal import Refused
from composition.request import Request

BOUNDS = (0.0, 1.5)
PENALTY = 0.05  # on the mean of the weights, as in the original


@dataclass(frozen=True)
class SearchResult:
    """request: with the best weights. score: its mean score. trials: (factors, mean score) of every trial, in order."""

    request: Request
    score: float
    trials: tuple[tuple[tuple[float, ...], float], ...]


def search(
    engine: Engine, request: Request, score: Callable[[Sequence[Image.Image]], float], *, budget: int = 40, seeds: int = 2,
    steps: int = 20, on_trial: Callable[[int, float], None] | None = None, cancel: threading.Event | None = None,
) -> SearchResult:  # fmt: skip
    """The factors in 0..1.5 with the highest score less 0.05 of their mean, after at most `budget` trials.

    score: of the pictures of one trial, the larger the better and about 1 at best (CLIPScore / 100); called with `seeds` pictures of
    `steps` steps, with the same noise in every trial. The search is COBYQA's, without gradients, and the same every time. Raises
    Refused without LoRAs, and what Engine.run raises.
    """
    if not request.loras:
        raise Refused("LoraHub searches the weights of LoRAs; this request has no LoRA: name at least one")
    if budget < 1 or seeds < 1:
        raise Refused(f"LoraHub needs a budget and seeds of at least 1; given {budget} and {seeds}")
    from scipy.optimize import minimize

    count, trials = len(request.loras), []

    def cost(vector: Any) -> float:
        factors = tuple(min(BOUNDS[1], max(BOUNDS[0], float(x))) for x in vector)
        if len(trials) >= budget:  # the solver's own count may run a little over
            return float("inf")
        trial_request = replace(weighted(request, factors), method="merge", options={}, steps=steps, count=seeds)
        value = float(score(engine.run(trial_request, cancel=cancel).images))
        trials.append((factors, value))
        if on_trial:
            on_trial(len(trials), value)
        return PENALTY * sum(factors) / count - value

    cost([1.0] * count)
    if budget > count + 2:
        minimize(cost, [1.0] * count, method="COBYQA", bounds=[BOUNDS] * count,
                 options={"maxfev": budget - 1, "initial_tr_radius": 0.4, "final_tr_radius": 0.02})
    best, value = max(trials, key=lambda trial: trial[1] - PENALTY * sum(trial[0]) / count)
    return SearchResult(weighted(request, best), value, tuple(trials))


def weighted(request: Request, factors: Sequence[float]) -> Request:
    """The request with each LoRA's weights times its factor."""
    return replace(request, loras=[lora.scaled(factor) for lora, factor in zip(request.loras, factors, strict=True)])
