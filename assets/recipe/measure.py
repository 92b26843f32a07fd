"""The figures of the model card: what Pocket draws, as its judge sees it, and what each LoRA adds.

Presence is a score above the judge's threshold (5 % of fresh renders without the concept pass it). Pictures are made by
stock diffusers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from composition.hooks.kernels import attention_for
from composition.training.defaults import halves
from retrieval.judge import Judge

from .loras import CARDS, judge_phrase, stem
from .objects import FACES, article
from .places import PLACES
from .world import World

STEPS, GUIDANCE = 25, 4.5


def singles(world: World, count: int) -> list[tuple[list[str], str, str]]:
    """(objects, place, prompt), evenly over objects and places."""
    rows = []
    for i in range(count):
        name, place = world.objects[i % len(world.objects)], world.places[(i * 7 + i // len(world.objects)) % len(world.places)]
        rows.append(([name], place, f"{article(name)} {PLACES[place][0]}"))
    return rows


def pairs(world: World, count: int, seed: int = 5) -> list[tuple[list[str], str, str]]:
    """The same with a second object, drawn at random."""
    rng, rows = random.Random(seed), []
    for (first,), place, _ in singles(world, count):
        second = rng.choice([n for n in world.objects if n != first])
        rows.append(([first, second], place, f"{article(first)} and {article(second)} {PLACES[place][0]}"))
    return rows


def paint(pipe: Any, prompts: Sequence[str], *, seed: int = 1, part: int = 50) -> list[Image.Image]:
    """A picture for each prompt, one generator each; products in bfloat16 where the processor has it."""
    flux = hasattr(pipe, "transformer")
    denoiser = pipe.transformer if flux else pipe.unet
    done, half = [], torch.autocast(pipe.device.type, torch.bfloat16, enabled=halves(pipe.device, denoiser.dtype))
    for i in range(0, len(prompts), part):
        some = list(prompts[i : i + part])
        generators = [torch.Generator().manual_seed(seed * 100_000 + i + k) for k in range(len(some))]
        arguments = _flux_arguments(pipe, len(some)) if flux else {"guidance_scale": GUIDANCE}
        with attention_for(pipe.device, positions=256 if flux else denoiser.config.sample_size**2), half:
            done += pipe(some, num_inference_steps=STEPS, generator=generators, **arguments).images
    return done


def _flux_arguments(pipe: Any, count: int) -> dict[str, Any]:
    """Arguments of the stock FluxPipeline for a small FLUX: its size, the length of its prompts, guidance by a second row."""
    side = pipe.vae.config.sample_size
    return {"true_cfg_scale": GUIDANCE, "negative_prompt": [""] * count, "width": side, "height": side,
            "max_sequence_length": pipe.tokenizer_2.model_max_length}


def score(judge: Judge, world: World, rows: Sequence[tuple[list[str], str, str]], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Percent: all objects of the prompt are present, they rank first by score, and the same for the place."""
    seen = judge.see(pictures)
    things, grounds = [article(n) for n in world.objects], [PLACES[p][0] for p in world.places]
    ranked = (seen @ judge.read(things).T).argsort(1, descending=True)
    where = (seen @ judge.read(grounds).T).argmax(1)
    present, all_present, named, placed, there = judge.present(pictures, things), [], [], [], []
    standing = judge.present(pictures, grounds)
    for i, (names, place, _) in enumerate(rows):
        wanted = [world.objects.index(n) for n in names]
        all_present.append(bool(present[i, wanted].all()))
        named.append(set(ranked[i, : len(wanted)].tolist()) == set(wanted))
        placed.append(int(where[i]) == world.places.index(place))
        there.append(bool(standing[i, world.places.index(place)]))
    shares = {"objects present": all_present, "objects named first": named, "place present": there, "place named first": placed}
    return {name: round(100 * float(np.mean(hits)), 1) for name, hits in shares.items()}


def base_figures(pipe: Any, judge: Judge, world: World, count: int = 200) -> dict[str, dict[str, float]]:
    """One object and two, in a place; and as a control the single pictures against their neighbour's prompt."""
    single, double = singles(world, count), pairs(world, count)
    alone = paint(pipe, [row[2] for row in single])
    return {"one": score(judge, world, single, alone), "two": score(judge, world, double, paint(pipe, [row[2] for row in double], seed=2)),
            "control": score(judge, world, single[1:] + single[:1], alone)}  # fmt: skip


def prompts_of(name: str, world: World, count: int) -> list[str]:
    """Prompts for one LoRA's concept, over the base's places, objects and faces."""
    category, words = CARDS[name].category, CARDS[name].triggers
    places = [PLACES[world.places[i % len(world.places)]][0] for i in range(count)]
    objects = [article(world.objects[(i * 5) % len(world.objects)]) for i in range(count)]
    if category == "place":
        return [f"{thing} {words}" for thing in objects]
    if category == "style":
        return [f"{thing} {place}, {words}" for thing, place in zip(objects, places, strict=True)]
    if category == "clothing":
        return [f"{article(FACES[i % len(FACES)])} wearing {article(name)} {place}" for i, place in enumerate(places)]
    return [f"{article(name)} {place}" for place in places]


def lora_figures(pipe: Any, judge: Judge, world: World, folder: Path, names: Sequence[str], least: int = 40,
                 each: int = 200) -> dict[str, dict[str, float]]:  # fmt: skip
    """Percent of pictures with the concept, without the LoRA and with it: 40 a LoRA, 200 a category at least."""
    figures = {}
    for name in names:
        category = CARDS[name].category
        count = max(least, -(-each // sum(card.category == category for card in CARDS.values())))
        prompts = prompts_of(name, world, count)
        without = judge.present(paint(pipe, prompts, seed=3), [judge_phrase(name)])
        pipe.load_lora_weights(folder / f"{stem(name)}.safetensors")
        with_it = judge.present(paint(pipe, prompts, seed=3), [judge_phrase(name)])
        pipe.unload_lora_weights()
        figures[name] = {"category": category, "pictures": count, "without": _percent(without), "with": _percent(with_it),
                         "judge recall": round(100 * judge.thresholds[judge_phrase(name)].recall, 1)}  # fmt: skip
    return figures


def _percent(hits: torch.Tensor) -> float:
    return round(100 * float(hits.float().mean()), 1)
