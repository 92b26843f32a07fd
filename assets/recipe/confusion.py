"""Which of the testbed's concepts the judge mistakes for which, and how well it sees leakage; on renders of its own.

A reader of an evaluation needs it: no method can be found present more often than the judge finds what is really there.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from retrieval.judge import CONFUSION, Judge

from .labelled import TEST, Labelled, Source, phrase
from .loras import CARDS
from .objects import CHARACTERS, THINGS, article
from .presence import alone, holds, known, pictures

FIRST = TEST + 2 * 10**8  # scene numbers of this file
KIND = {"character": "object", "object": "object", "clothing": "worn", "place": "place", "style": "style"}


def matrix(judge: Judge, source: Source, each: int) -> dict[str, Any]:
    """Share of scenes with the row's concept (and other things) in which the judge sees the column's although it was not drawn.

    On the diagonal, the share in which it is rightly seen. Half of the scenes show the concept as alone as it can be.
    """
    concepts = [(KIND[card.category], name) for name, card in CARDS.items()]
    phrases = [phrase(*concept) for concept in concepts]
    rows = []
    for number, (kind, name) in enumerate(concepts):
        scenes = [_scene(source, kind, name, FIRST + number * 10**5 + i) for i in range(each)]
        present = judge.present(pictures(scenes), phrases)
        truth = torch.tensor([[holds(scene, *concept) for concept in concepts] for scene in scenes])
        counted = ~truth
        counted[:, number] = True
        rows.append([round(float(present[counted[:, k], k].float().mean()), 3) for k in range(len(concepts))])
    return {"phrases": phrases, "rows": rows, "each": each}


def _scene(source: Source, kind: str, name: str, seed: int) -> Labelled:
    if seed % 2:
        return alone(source, kind, name, seed)
    fixed = {"object": {"subject": name}, "place": {"place": name}, "style": {"style": name}}.get(kind)
    return known(source, seed, **fixed) if fixed else source.scene(seed, wears=name, subject="fox")


def leakage(judge: Judge, source: Source, each: int) -> dict[str, float]:
    """How often leakage is seen: in scenes with one thing twice (rightly), in those with both things, and with one once."""
    rng, things = random.Random("leakage"), [*CHARACTERS, *THINGS]
    detected: dict[str, list[bool]] = {"two of one": [], "one of each": [], "one alone": []}
    for i in range(each):
        first, second = rng.sample(things, 2)
        drawn = {"two of one": [first, first], "one of each": [first, second], "one alone": [first]}
        shown = [_drawn(source, names, FIRST + 10**7 + i) for names in drawn.values()]
        here, twice = judge.present(shown, [article(second)])[:, 0], judge.doubled(shown, [article(first)])[:, 0]
        for kind, hit in zip(detected, (twice & ~here).tolist(), strict=True):
            detected[kind].append(hit)
    return {kind: round(sum(hits) / len(hits), 3) for kind, hits in detected.items()}


def _drawn(source: Source, names: list[str], seed: int) -> Image.Image:
    """A scene of exactly these objects, in order, one perhaps twice."""
    place = random.Random(f"place/{seed}").choice(source.places)
    return Image.fromarray(source.world.scene(seed, names=names, place=place).picture)


def settle(folder: Path, source: Source, *, each: int = 200) -> dict:
    """Write confusion.json into the judge's folder."""
    judge = Judge.open(str(folder))
    table = matrix(judge, source, each) | {"leakage": leakage(judge, source, each)}
    rows = ",\n  ".join(json.dumps(row) for row in table["rows"])
    rest = {key: value for key, value in table.items() if key != "rows"}
    (folder / CONFUSION).write_text(json.dumps(rest)[:-1] + f', "rows": [\n  {rows}\n]}}\n', "utf-8")
    return table
