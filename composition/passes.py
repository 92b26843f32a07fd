"""Once through the loop: conditions read, latents begun, denoised by a method's predictions, decoded."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from composition import starting
from composition.backbones import schedulers
from composition.loop import NotFinite, Predict, Step, sample
from composition.notes import overflow
from composition.refusal import Refused
from composition.run import Run


def through(
    run: Run, part: starting.Pass, compose: Callable[[], AbstractContextManager[Predict]], start: Any, mask: Image.Image | None,
    tell: Callable[[Step], None], seconds: dict[str, float],
) -> tuple[list[Image.Image], Float[Tensor, "B *S"]]:
    """The pictures, and their latents. start: as of `starting.begin`, None: noise. tell: sees every step. seconds: what each stage took is added.

    Raises Refused for numbers that overflow.
    """
    backbone = run.backbone
    try:
        if run.conditions is not None:
            with timed(seconds, "conditions"):
                run.read_conditions()
        with timed(seconds, "denoise"):
            run.check_cancel()
            begun = starting.Begun(*backbone.start(run.request, run.scheduler, run.generators), None) if start is None else (
                starting.begin(backbone, part, run.scheduler, run.generators, start, mask))
            with compose() as predict:
                latents = sample(
                    predict, run.scheduler, begun.latents, begun.times, stages=schedulers.stages(run.scheduler, len(begun.times)),
                    generator=list(run.generators), on_step=tell, keep=begun.keep)
        with timed(seconds, "decode"):
            return backbone.decode(latents), latents
    except NotFinite as error:
        raise Refused(overflow(error, run.request, run.adapters, backbone)) from None
    finally:
        backbone.release()


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds what happens inside to a stage's seconds."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun
