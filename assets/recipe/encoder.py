"""The encoder stage: a weight encoder trained on the pool (`pool`), and how well prompts find LoRAs of it that training never saw.

Every LoRA of the pool is read, and drawn with as `medley index --behaviour` does: the directions in which pictures move are the encoder's
teacher beside the captions, and what it is compared with, as is a transformer on sketches of the same LoRAs. Training sees the split ``train``
alone. Held-out LoRAs are looked for by prompts among distractors that training did see, none of them of a concept that is looked for; file names
and headers say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from composition import Engine, Lora, atomic
from composition.backbones.loading import skeleton
from composition.loras import reader
from composition.loras.kinds.lora import Factors
from composition.profiling import behaviour as measuring
from composition.profiling.behaviour import POCKET
from retrieval import behaviour, metrics, null, ridge, training
from retrieval.encode import Encoder, Settings
from retrieval.judge import Judge
from retrieval.linear import LinearEncoder, LinearSettings
from retrieval.sketch import Sketch, named, sketch
from retrieval.tokens import layers, tokens
from retrieval.training import Lessons, Plan

from .pool import MANIFEST

DISTRACTORS = 300
SPLITS = ("seen", "unseen")
Row = Mapping[str, Any]  # of the manifest


class Weights(NamedTuple):
    """What an encoder makes of LoRAs (n, D), and of the judge's text vectors."""

    vectors: Float[torch.Tensor, "n D"]
    read: Callable[[Float[torch.Tensor, "t T"]], Float[torch.Tensor, "t D"]]


class Looks(NamedTuple):
    """What the judge sees of each LoRA: the mean of its pictures (n, D), and the direction in which the base's moved (n, D), both of length 1."""

    pictures: Float[np.ndarray, "n D"]
    directions: Float[np.ndarray, "n D"]


def rows_of(folder: Path) -> list[Row]:
    """The pool's LoRAs that are there, in order."""
    rows = json.loads((folder / MANIFEST).read_text("utf-8"))["loras"]
    return [row for row in rows if (folder / row["file"]).is_file()]


def updates(folder: Path, rows: Sequence[Row], base: Path) -> list[Mapping[str, Factors]]:
    """What each changes, by layer. base: the diffusers folder that they are for."""
    components = skeleton.of_folder(base)
    return [named(reader.read(folder / row["file"], components, "sd").factors) for row in rows]


def fitted(rows: Sequence[Row], loras: Sequence[Mapping[str, Factors]], judge: Judge, seen: Looks | None) -> LinearEncoder:
    """The encoder that ships: of the LoRAs to learn from, and of every layer that one of them changes."""
    own = [index for index, row in enumerate(rows) if row["split"] == "train"]
    shapes = dict(sorted(ridge.shapes(*(loras[index] for index in own)).items()))
    centre = judge.read(null.phrases(list(judge.thresholds))).mean(0)
    taught = lessons([rows[index] for index in own], judge, None if seen is None else seen.directions[own])
    fit = ridge.fit([loras[index] for index in own], taught, list(shapes), centre)
    settings = LinearSettings(shapes, "pocket", "sd", judge.name, len(own))
    return LinearEncoder.of(fit, settings, centre)


def sketches(folder: Path, rows: Sequence[Row], base: Path) -> list[Sketch]:
    """base: the diffusers folder that they are for."""
    components = skeleton.of_folder(base)
    return [sketch(folder / row["file"], components, "sd") for row in rows]


def looks(engine: Engine, judge: Judge, folder: Path, rows: Sequence[Row], work: Path, report: Callable[[str], None] = print) -> Looks:
    """Draw with every LoRA that was not drawn with yet; what was seen is kept in ``work``."""
    work.mkdir(parents=True, exist_ok=True)

    def see(pictures):
        return judge.see(pictures).numpy()

    def kept(name: str, lora: Lora | None) -> np.ndarray:
        file = work / f"{name}.json"
        if not file.is_file():
            atomic.write(file, json.dumps(np.round(measuring.seen(engine, see, POCKET, lora), 6).tolist()))
            report(f"{name}: drawn")
        return np.array(json.loads(file.read_text("utf-8")))

    base = kept("base", None)
    vectors = np.stack([kept(Path(row["file"]).stem, Lora(str(folder / row["file"]))) for row in rows])
    return Looks(_unit(vectors.mean(1)), _unit((vectors - base).mean(1)))


def lessons(rows: Sequence[Row], judge: Judge, directions: Float[np.ndarray, "n D"] | None) -> Lessons:
    """Of LoRAs to learn from: those of one concept are a group, which its phrase, its prompts and the captions that name it describe."""
    concepts = {concept: number for number, concept in enumerate(dict.fromkeys(row["concept"] for row in rows))}
    texts: dict[tuple[int, str], None] = {}
    for row in rows:
        named = row["captions"] if row["trigger"] in (row["concept"], row["phrase"]) else []
        texts |= dict.fromkeys((concepts[row["concept"]], text) for text in (row["phrase"], *row["queries"], *named))
    return Lessons(torch.tensor([concepts[row["concept"]] for row in rows]), judge.read([text for _, text in texts]),
                   torch.tensor([group for group, _ in texts]), None if directions is None else torch.from_numpy(directions).float())  # fmt: skip


def transformed(rows: Sequence[Row], read: Sequence[Sketch], judge: Judge, seen: Looks | None, checkpoint: Path | None, plan: Plan,
          report: Callable[[str], None] = print, **shape: Any) -> Encoder:  # fmt: skip
    """A transformer on sketches of those to learn from. shape: of `Settings`."""
    own = [index for index, row in enumerate(rows) if row["split"] == "train"]
    known = layers([read[index] for index in own])
    width = judge.read(["a picture"]).shape[1]
    settings = Settings(layers=known, base="pocket", family="sd", judge=judge.name, text=width, dimension=width, **shape)
    loras = tokens([read[index] for index in own], known, settings.side)
    taught = lessons([rows[index] for index in own], judge, None if seen is None else seen.directions[own])

    def on_step(step: int, losses: Mapping[str, float]) -> None:
        if step % 50 == 0:
            report(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))

    return training.train(loras, taught, settings, plan, checkpoint=checkpoint, on_step=on_step)


def figures(rows: Sequence[Row], judge: Judge, seen: Looks | None, by_weights: Mapping[str, Weights]) -> dict[str, dict[str, dict[str, str]]]:
    """By split, by what ranks, the measures with their intervals. Queries are the held-out LoRAs' own prompts; one thing is right: that LoRA.

    by_weights: name to the vectors of all LoRAs and what makes vectors of the judge's text vectors.
    """
    table: dict[str, dict[str, dict[str, str]]] = {}
    for split in SPLITS:
        held = [index for index, row in enumerate(rows) if row["split"] == split]
        concepts = {rows[index]["concept"] for index in held}
        others = [index for index, row in enumerate(rows) if row["split"] == "train" and row["concept"] not in concepts][:DISTRACTORS]
        pairs = [(owner, query) for owner, index in enumerate(held) for query in rows[index]["queries"]]
        if not held:
            continue
        owners, prompts, candidates = np.array([owner for owner, _ in pairs]), [query for _, query in pairs], held + others
        right = owners[:, None] == np.arange(len(candidates))[None, :]
        texts = judge.read(prompts)
        names = [rows[index]["name"] for index in candidates]
        scores = {"chance": metrics.chance(len(prompts), len(candidates)),
                  "file names": metrics.bm25(prompts, [rows[index]["file"] for index in candidates]),
                  "names, if the files had theirs": metrics.bm25(prompts, names),
                  "names read by the judge, if the files had theirs": (texts @ judge.read(names).T).numpy()}  # fmt: skip
        for name, (vectors, read) in by_weights.items():
            scores[name] = (read(texts) @ vectors[candidates].T).numpy()
        if seen is not None:
            words = np.stack([behaviour.direction(lambda texts: judge.read(list(texts)).numpy(), prompt, behaviour.POCKET) for prompt in prompts])
            scores["behaviour"] = words @ seen.directions[candidates].T
            scores["the judge on the LoRAs' pictures"] = texts.numpy() @ seen.pictures[candidates].T
        table[f"{split}: {len(held)} LoRAs, {len(others)} distractors, {len(prompts)} prompts"] = {
            name: {measure: str(value) for measure, value in metrics.evaluate(values, right, owners).items()} for name, values in scores.items()}
    return table


def _unit(vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
