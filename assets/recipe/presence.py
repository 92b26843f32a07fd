"""How good the judge is: thresholds of presence and its accuracy, on renders it was never trained on.

The threshold of "a fox" lets 5 % of renders without a fox pass. It is set on other renders than those that are reported on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from retrieval.judge import THRESHOLDS, Judge, Threshold, threshold, write_thresholds

from .labelled import TEST, Labelled, Source, phrase
from .objects import FACES, HELD_OBJECTS, WORN

HELD = TEST + 10**8  # scene numbers of the report
KINDS = ("object", "worn", "place", "style")


def concepts(source: Source) -> list[tuple[str, str]]:
    """(kind, name) of everything that has a threshold of presence: the world's own and what is held out, not the further names."""
    return [*(("object", n) for n in (*source.own, *HELD_OBJECTS)), *(("worn", n) for n in WORN),
            *(("place", n) for n in source.places), *(("style", n) for n in source.styles)]  # fmt: skip


def known(source: Source, seed: int, **fixed: Any) -> Labelled:
    """A scene of the world and what is held out, without further names as its subject."""
    subject = random.Random(f"known/{seed}").choice([*source.own, *HELD_OBJECTS])
    return source.scene(seed, **({"subject": subject} | fixed))


def alone(source: Source, kind: str, name: str, seed: int) -> Labelled:
    """A fresh scene with the concept: one object in a place, plain unless the concept is a style."""
    rng = random.Random(f"{kind}/{name}/{seed}")
    fixed: dict[str, Any] = {"count": 1, "style": "", "wears": None}
    if kind == "worn":
        fixed |= {"wears": name, "subject": rng.choice([n for n in (*FACES, "raccoon", "wolf") if n in source.own or n in HELD_OBJECTS])}
    else:
        fixed["subject"] = rng.choice(source.own)
    fixed |= {"object": {"subject": name}, "place": {"place": name}, "style": {"style": name}, "worn": {}}[kind]
    return source.scene(seed, **fixed)


def pictures(scenes: Sequence[Labelled]) -> list[Image.Image]:
    return [Image.fromarray(scene.picture) for scene in scenes]


def holds(scene: Labelled, kind: str, name: str) -> bool:
    return {"place": scene.place == name, "style": scene.style == name}.get(kind, name in scene.names)


def thresholds(judge: Judge, source: Source, *, without: int = 3000, each: int = 60) -> dict[str, Threshold]:
    """A threshold for every concept's phrase: set on `without` scenes less those that hold it; recall on `each` with it alone."""
    scenes = [known(source, TEST + i) for i in range(without)]
    seen, table = judge.see(pictures(scenes)), {}
    for kind, name in concepts(source):
        text = judge.read([phrase(kind, name)])[0]
        others = torch.tensor([not holds(scene, kind, name) for scene in scenes])
        mine = judge.see(pictures([alone(source, kind, name, TEST + 10**7 + i) for i in range(each)]))
        table[phrase(kind, name)] = threshold((seen @ text)[others], mine @ text)
    return table


def report(judge: Judge, source: Source, *, each: int = 30, mixed: int = 1500) -> dict[str, Any]:
    """Percent on fresh renders: top-1 by kind, recall and false positives of presence, in single and in mixed scenes."""
    figures: dict[str, Any] = {}
    every = {kind: [n for k, n in concepts(source) if k == kind] for kind in KINDS}
    for kind in KINDS:
        right, wide, recalled, rows = [], [], [], {}
        texts = judge.read([phrase(kind, n) for n in every[kind]])
        further = judge.read([phrase(kind, n) for n in source.names]) if kind == "object" else texts
        for k, name in enumerate(every[kind]):
            seen = judge.see(pictures([alone(source, kind, name, HELD + i) for i in range(each)]))
            hits = (seen @ texts.T).argmax(1) == k
            right.append(hits)
            if kind == "object":
                wide.append((seen @ further.T).argmax(1) == source.names.index(name))
            recalled.append(seen @ texts[k] >= judge.thresholds[phrase(kind, name)].score)
            rows[name] = _percent(hits)
        figures[kind] = {"top-1": _percent(torch.cat(right)), "recall": _percent(torch.cat(recalled)), "of": len(every[kind]),
                       "worst": sorted(rows.items(), key=lambda row: row[1])[:5]}  # fmt: skip
        if wide:
            figures[kind]["top-1 of all names"] = _percent(torch.cat(wide))
            figures[kind]["all names"] = len(source.names)
    figures["mixed"] = _mixed(judge, source, [known(source, HELD + 10**7 + i) for i in range(mixed)])
    return figures


def _mixed(judge: Judge, source: Source, scenes: Sequence[Labelled]) -> dict[str, float]:
    """Recall and false positives over scenes of one to three objects, a quarter of them in a style."""
    listed = concepts(source)
    present = judge.present(pictures(scenes), [phrase(*concept) for concept in listed]).numpy()
    truth = np.array([[holds(scene, *concept) for concept in listed] for scene in scenes])
    return {f"{kind} recall": 100 * float(present[:, k][truth[:, k]].mean()) for kind in KINDS
            for k in [[i for i, concept in enumerate(listed) if concept[0] == kind]]} | {
            f"{kind} false positives": 100 * float(present[:, k][~truth[:, k]].mean()) for kind in KINDS
            for k in [[i for i, concept in enumerate(listed) if concept[0] == kind]]}  # fmt: skip


def _percent(hits: torch.Tensor) -> float:
    return round(float(hits.float().mean()) * 100, 1)


def settle(folder: Path, source: Source, share: float = 1.0) -> dict[str, Any]:
    """Write the thresholds into the judge's folder and return its report. share: of the usual number of renders, to be quicker."""
    counts = {"without": 3000, "each": 60}
    table = thresholds(Judge.open(str(folder)), source, **{name: max(2, round(n * share)) for name, n in counts.items()})
    write_thresholds(folder / THRESHOLDS, table)
    return report(Judge.open(str(folder)), source, each=max(1, round(30 * share)), mixed=max(20, round(1500 * share)))
