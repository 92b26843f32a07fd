"""Measures a LoRA's behaviour: pictures with it and without, seen by an image encoder (`composition.profiles.behaviour`).

The base's pictures are the same for every LoRA: draw them once (`seen` without a LoRA) and hand them to each `measure`.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from composition.engine import Engine
from composition.profiles.behaviour import Behaviour, Probe
from composition.refusal import Refused
from composition.request import Lora, Request

See = Callable[[Sequence[Image.Image]], Float[np.ndarray, "n D"]]
STILL = 1e-6  # length of a difference from which it has a direction; below it is rounding

# Prompts that leave most open: what they do not say the LoRA says. By two pictures of "a fox in a meadow" 17 % of Pocket's LoRAs are found, by
# two of the empty prompt 89 %, and guidance is not needed (docs/results.md). One names a face, for what is worn.
GENERAL = Probe(("", "a photo", "a person", "an animal", "a thing on a table", "a building", "a landscape", "a drawing"), seeds=2, steps=8)
POCKET = Probe(("", "a picture", "in the snow", "in a room", "a cat"), seeds=2, steps=8, guidance=1.0)


def probe_of(model: str) -> Probe:
    """What to draw with this model: Pocket's small world has words of its own."""
    return POCKET if model in ("pocket", "pocket-flux") else GENERAL


def measure(
    engine: Engine, see: See, lora: Lora, probe: Probe, *, base: Float[np.ndarray, "n D"] | None = None, judge: str = "",
    on_step: Callable[[int, int], None] | None = None, cancel: threading.Event | None = None,
) -> Behaviour:  # fmt: skip
    """Draw the probe with the LoRA, and without it where `base` (what `seen` returned for this probe) is not given.

    see: pictures to vectors of any length but 0. judge: its name. on_step: (steps done, of all). Raises Refused as Engine.run does,
    Cancelled when `cancel` is set.
    """
    receipt = engine.inspect(lora.source)
    each = probe.pictures * probe.steps
    whole, begun = (each, 0) if base is not None else (2 * each, each)
    report = (lambda done: on_step(done, whole)) if on_step else None
    if base is None:
        base = seen(engine, see, probe, on_step=report, cancel=cancel)
    elif len(base) != probe.pictures:
        raise ValueError(f"the base was seen in {len(base)} pictures, this probe has {probe.pictures}")
    with_it = seen(engine, see, probe, lora, on_step=(lambda done: report(begun + done)) if report else None, cancel=cancel)
    return behaviour(with_it, base, name=lora.name, tensor_sha256=receipt.tensor_sha256, model=engine.name, judge=judge, probe=probe)


def seen(
    engine: Engine, see: See, probe: Probe, lora: Lora | None = None, *, on_step: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
) -> Float[np.ndarray, "n D"]:  # fmt: skip
    """The probe's pictures with the LoRA, or of the base alone, as vectors of length 1: prompt after prompt, seed after seed.

    on_step: steps done. Prompts share the fold.
    """
    images: list[Image.Image] = []
    with engine.group():
        for prompt in probe.prompts:
            before = len(images) * probe.steps
            request = Request(prompt=prompt, loras=[lora] if lora else [], model=engine.name, steps=probe.steps, guidance=probe.guidance,
                              count=probe.seeds)  # fmt: skip
            follow = (lambda event, before=before: on_step(before + event.index)) if on_step else None
            images += engine.run(request, on_step=follow, cancel=cancel).images
    vectors = np.asarray(see(images), np.float64)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if vectors.shape != (len(images), vectors.shape[-1]) or not np.isfinite(vectors).all() or not lengths.all():
        raise Refused(f"the image encoder returned numbers of shape {vectors.shape} that are no {len(images)} vectors of a direction each")
    return vectors / lengths


def behaviour(
    with_it: Float[np.ndarray, "n D"], base: Float[np.ndarray, "n D"], *, name: str, tensor_sha256: str, model: str, judge: str, probe: Probe,
) -> Behaviour:  # fmt: skip
    """The figures of vectors of length 1, row i of both of the same prompt and noise."""
    moved = with_it - base
    lengths = np.linalg.norm(moved, axis=-1)
    mean = moved.mean(0)
    size = float(np.linalg.norm(mean))
    # sum over i != j of cos(d_i, d_j) is |sum of unit d|^2 less the number of them; a picture that did not move agrees with none.
    units = moved / np.maximum(lengths, STILL)[:, None] * (lengths > STILL)[:, None]
    count = len(units)
    consistency = (float(units.sum(0) @ units.sum(0)) - float((lengths > STILL).sum())) / (count * (count - 1))
    direction = mean / size if size > STILL else np.zeros_like(mean)
    return Behaviour(name, tensor_sha256, model, judge, probe, tuple(map(float, direction)), float(lengths.mean()),
                     max(-1.0, min(1.0, consistency)), apart(base))  # fmt: skip


def apart(vectors: Float[np.ndarray, "n D"]) -> float:
    """The mean distance between two different rows."""
    products = np.clip(vectors @ vectors.T, -1.0, 1.0)
    distances = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * products))
    count = len(vectors)
    return float(distances[~np.eye(count, dtype=bool)].mean()) if count > 1 else 0.0
