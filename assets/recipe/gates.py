"""The gates stage: AutoLoRA's gates for a first base, learned from the pool's LoRAs, on scenes of one to three of their concepts.

Of the LoRAs of a step, two to five, the prompt names some, the others are there to be left out. None of the bundled LoRAs is ever seen,
so that sets of those measure the gates fairly.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from composition import Lora, backbones
from composition.adapters import Adapters
from composition.backbones.loading import open as opening
from composition.training import gates
from composition.training.concept import latents_of

from . import flux, looks, pool
from .autoencoder import tensor
from .base import CENTRE, WIDTH
from .objects import OBJECTS, article
from .places import HELD_PLACES, PLACES, painted
from .styles import STYLES
from .world import World

FIRST = 9 * 10**10  # scene numbers of the first step; the next has them a hundred on
PICTURES = 8  # of a step
PLAN = gates.Plan(noise=(CENTRE, WIDTH), half=True, steps=1500)
# Kinds of gates by name. What ends in -text has them in the layers that read the prompt alone, where the tokens of one LoRA stand apart.
KINDS = {"layer": {"film": False}, "layer-text": {"film": False}, "rank": {}, "rank-plain": {"film": False}, "rank-text": {}, "element": {"film": False},
         "element-shared": {"film": False, "shared": True}}  # fmt: skip


class Named(NamedTuple):
    """What a prompt names: the pool's LoRAs of things (with their concepts), of a style and of a place."""

    things: Sequence[Mapping]
    style: Mapping | None
    place: Mapping | None

    @property
    def files(self) -> list[str]:
        return [row["file"] for row in (*self.things, self.style, self.place) if row is not None]


class Scenes:
    """Rows of a step by its number, drawn from the art that the pool's LoRAs were learned from."""

    def __init__(self, backbone, art: Path, manifest: Sequence[Mapping], pictures: int = PICTURES):
        self.backbone, self.pictures = backbone, pictures
        rows = [row for row in manifest if row["split"] == "train"]
        self.rows = {kind: [row for row in rows if row["category"] == kind] for kind in ("object", "style", "place")}
        entries = [entry for entry in pool.entries(art) if entry.category == "object" and entry.split == "train"]
        self.world: World = pool.world_of(art, entries, backbone.pipeline.vae.config.sample_size)
        self.grounds = {row["file"]: np.stack([painted((HELD_PLACES | looks.PLACES)[row["concept"]][1], self.world.size, f"{row['concept']}/{row['art']}/{i}")
                                               for i in range(8)]) for row in self.rows["place"]}  # fmt: skip

    def __call__(self, step: int) -> gates.Rows:
        rng = random.Random(f"gates/{step}")
        vendor = rng.choice(list({row["art"] for row in self.rows["object"]}))
        things = rng.sample([row for row in self.rows["object"] if row["art"] == vendor], 3)
        style, place = rng.choice(self.rows["style"]), rng.choice(self.rows["place"])
        loaded = [*things, *rng.sample([style, place], rng.randrange(3))]
        rng.shuffle(loaded)
        loaded = loaded[: rng.randint(2, 5)]
        drawn, prompts, others = [], [], []
        for i in range(self.pictures):
            named, other = self._named(rng, loaded), self._named(rng, loaded)
            picture, prompt = self._scene(FIRST + 100 * step + i, rng, named, vendor)
            drawn.append(picture)
            prompts.append(prompt)
            others.append(self._scene(FIRST + 100 * step + i, rng, other, vendor)[1] if not set(other.files) & set(named.files) else "")
        weights = {row["file"]: rng.uniform(0.8, 1.1) for row in loaded}
        return gates.Rows(weights, latents_of(self.backbone, tensor(np.stack(drawn))), prompts, others)

    def _named(self, rng: random.Random, loaded: Sequence[Mapping]) -> Named:
        """Some of the LoRAs, mostly one or all of them."""
        count = rng.choice((1, 1, len(loaded), rng.randint(1, len(loaded))))
        chosen = rng.sample(list(loaded), count)
        return Named([row for row in chosen if row["category"] == "object"], next((row for row in chosen if row["category"] == "style"), None),
                     next((row for row in chosen if row["category"] == "place"), None))  # fmt: skip

    def _scene(self, seed: int, rng: random.Random, named: Named, vendor: str) -> tuple[np.ndarray, str]:
        """(picture, prompt): things of the prompt and, where there is room, one that the base knows."""
        names = [row["concept"] for row in named.things]
        if not names or len(names) < 2 and rng.random() < 0.3:
            names.append(rng.choice(list(OBJECTS)[:48]))
        usual, where = self.world.grounds, rng.choice(list(PLACES))
        if named.place is not None:
            where = pool.STAND_IN
            self.world.grounds = {where: self.grounds[named.place["file"]]}
        try:
            scene = self.world.scene(seed, names=names, place=where, vendor=vendor)
        finally:
            self.world.grounds = usual
        picture, prompt = scene.picture, scene.caption
        for row in named.things:
            prompt = prompt.replace(article(row["concept"]), article(row["trigger"]))
        if named.place is not None:
            prompt = prompt.replace(PLACES[where][0], named.place["trigger"])
        if named.style is not None:
            picture, prompt = (STYLES | looks.STYLES)[named.style["concept"]][1](picture), f"{prompt}, {named.style['trigger']}"
        return picture, prompt


def make(pipe, art: Path, folder: Path, out: Path, work: Path, kind: str, *, steps: int = 0, report: Callable[[str], None] = print, base: str = "pocket",
         pictures: int = PICTURES) -> Path | None:  # fmt: skip
    """Train gates of one of KINDS from the pool in `folder`, resuming from `work`; the file is `out`."""
    rows = json.loads((folder / pool.MANIFEST).read_text())["loras"]
    backbone = backbones.of(pipe, opening.family(pipe))
    adapters = Adapters(backbone.components, family=backbone.family, block=backbone.block)
    noise = (flux.CENTRE, flux.WIDTH) if backbone.family == "flux" else PLAN.noise
    plan = gates.Plan(**{**vars(PLAN), "noise": noise, "kind": kind.partition("-")[0], **KINDS[kind], "steps": steps or PLAN.steps})
    losses: list[tuple[float, float]] = []

    def on_step(step: int, loss: float, kept: float) -> None:
        losses.append((loss, kept))
        if step % 50 == 0:
            mean, share = torch.tensor(losses).mean(0).tolist()
            report(f"gates {kind}: step {step} of {plan.steps}, loss {mean:.4f}, margin kept {share:.2f}")
            losses.clear()

    loras = {row["file"]: (Lora(str(folder / row["file"])), folder / row["file"], row["category"]) for row in rows if row["split"] == "train"}
    try:
        targets = gates.touched(adapters, dict(list(loras.items())[:2]))
        targets = [path for path in targets if backbone.axis(path).kind == "text"] if kind.endswith("-text") else targets
        return gates.train(backbone, adapters, loras, Scenes(backbone, art, rows, pictures), plan, out, base=base, checkpoint=work / f"gates-{kind}.pt",
                           on_step=on_step, targets=targets, pool=pool.RECIPE)  # fmt: skip
    finally:
        adapters.close()
