"""The figures: a small convnet names what is in a picture; its own accuracy on fresh scenes is printed beside every figure.

It is trained on fresh renders of the world and never used in training the base.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .autoencoder import tensor
from .loop import attention
from .objects import HELD_OBJECTS, article
from .places import HELD_PLACES, PLACES
from .world import Scene, World

START, TEST = 2 * 10**9, 3 * 10**9  # scene numbers for its training and its own test


class Judge(nn.Module):
    """Objects by region and the place: pictures (B, 3, size, size) -> logits (B, 3, N) whole, left, right and (B, M)."""

    def __init__(self, objects: Sequence[str], places: Sequence[str], size: int, width: int = 32):
        super().__init__()
        self.objects, self.places = list(objects), list(places)
        layers, wide = [], 3
        for out in (width, 2 * width, 4 * width, 4 * width):
            layers += [nn.Conv2d(wide, out, 3, 2 if size // 2 ** (len(layers) // 3) > 8 else 1, 1), nn.BatchNorm2d(out), nn.ReLU()]
            wide = out
        self.body = nn.Sequential(*layers, nn.Conv2d(wide, wide, 3, 1, 1), nn.BatchNorm2d(wide), nn.ReLU())
        self.thing, self.place = nn.Conv2d(wide, len(self.objects), 1), nn.Linear(wide, len(self.places))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(x)
        grid = self.thing(h)
        half = grid.shape[-1] // 2
        regions = [grid.amax((2, 3)), grid[..., :half].amax((2, 3)), grid[..., half:].amax((2, 3))]
        return torch.stack(regions, 1), self.place(h.mean((2, 3)))


def labels(judge: Judge, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Presence (B, 3, N), which regions count (B, 3, 1), place (B,)."""
    present, counts = torch.zeros(len(scenes), 3, len(judge.objects)), torch.zeros(len(scenes), 3, 1)
    for i, scene in enumerate(scenes):
        counts[i, 0] = 1
        beside = len(scene.objects) == 2 and abs(scene.objects[0].x - scene.objects[1].x) > 0.3
        counts[i, 1:] = float(beside)
        for thing in scene.objects:
            k = judge.objects.index(thing.name)
            present[i, 0, k] = 1
            if beside:
                present[i, 1 if thing.x < 0.5 else 2, k] = 1
    return present, counts, torch.tensor([judge.places.index(s.place) for s in scenes])


def train_judge(world: World, also: Sequence[str], file: Path, *, steps: int = 600, size: int = 64, device: str = "cpu") -> Judge:
    """Train, or read back from ``file``. ``also``: the held-out objects and places, which the world must hold."""
    extra_places = [n for n in also if n in HELD_PLACES]
    extra = [n for n in also if n not in HELD_PLACES]
    judge = Judge([*world.objects, *extra], [*world.places, *extra_places], world.size).to(device)
    if file.is_file():
        judge.load_state_dict(torch.load(file, weights_only=True))
        return judge.eval()
    rng = random.Random(1)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        scenes = [draw(world, rng, START + step * size + i, extra, extra_places) for i in range(size)]
        present, counts, place = (t.to(device) for t in labels(judge, scenes))
        x = tensor(np.stack([s.picture for s in scenes])).to(device)
        things, where = judge(soften(x, rng))
        loss = 8 * (F.binary_cross_entropy_with_logits(things, present, reduction="none") * counts).mean()
        loss = loss + F.cross_entropy(where, place)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        plan.step()
    judge.eval()
    torch.save(judge.state_dict(), file)
    return judge


def soften(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Half of the batches blurred, all a little noisy: generated pictures are softer than renders."""
    if rng.random() < 0.5:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x + 0.06 * torch.randn_like(x)


def draw(world: World, rng: random.Random, seed: int, extra: list[str], extra_places: list[str]) -> Scene:
    """A fresh scene in which held-out objects and places are as frequent as the world's own."""
    subject = rng.choice([*world.objects, *extra]) if extra else None
    return world.scene(seed, subject=subject, place=rng.choice([*world.places, *extra_places]))


@torch.no_grad()
def read(judge: Judge, pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the judge for (B, size, size, 3) uint8."""
    parts = [judge(tensor(pictures[i : i + 64])) for i in range(0, len(pictures), 64)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def asked(world: World, kind: str, count: int, seed: int = 5) -> list[tuple[list[str], str, str]]:
    """(objects, place, prompt) for ``single`` or ``pair``, evenly over objects and places."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        first, place = world.objects[i % len(world.objects)], world.places[(i // 3) % len(world.places)]
        names = [first] if kind == "single" else [first, rng.choice([n for n in world.objects if n != first])]
        rows.append((names, place, f"{' and '.join(article(n) for n in names)} {PLACES[place][0]}"))
    return rows


def score(judge: Judge, rows: list[tuple[list[str], str, str]], pictures: np.ndarray) -> dict[str, float]:
    """Percent: the object named (single) or both, and both on their sides (pair); the place."""
    things, where = read(judge, pictures)
    places = [judge.places[i] for i in where.argmax(1)]
    result = {"place": float(np.mean([p == r[1] for p, r in zip(places, rows, strict=True)]) * 100)}
    wanted = [[judge.objects.index(n) for n in r[0]] for r in rows]
    if len(wanted[0]) == 1:
        result["object"] = float(np.mean([int(t[0].argmax()) == w[0] for t, w in zip(things, wanted, strict=True)]) * 100)
        return result
    tops = [set(t[0].topk(2).indices.tolist()) for t in things]
    result["either"] = float(np.mean([len(t & set(w)) for t, w in zip(tops, wanted, strict=True)]) * 50)
    result["both"] = float(np.mean([t == set(w) for t, w in zip(tops, wanted, strict=True)]) * 100)
    sides = [[int(t[1].argmax()), int(t[2].argmax())] for t in things]
    result["sides"] = float(np.mean([s == w for s, w in zip(sides, wanted, strict=True)]) * 100)
    return result


def itself(judge: Judge, world: World, kind: str, count: int = 300) -> dict[str, float]:
    """The judge's own score on fresh renders of the same kind of prompt."""
    rows, pictures, seed = [], [], TEST
    while len(rows) < count:
        seed += 1
        scene = world.scene(seed, count=1 if kind == "single" else 2)
        names = [t.name for t in scene.objects]
        if kind == "pair" and abs(scene.objects[0].x - scene.objects[1].x) < 0.3:
            continue
        rows.append((names, scene.place, scene.caption))
        pictures.append(scene.picture)
    return score(judge, rows, np.stack(pictures))


def paint(pipe: Any, prompts: list[str], *, seed: int = 1, steps: int = 25, guidance: float = 4.5, part: int = 50) -> np.ndarray:
    """Pictures (n, size, size, 3) uint8 of a stock pipeline, one generator for each prompt."""
    pipe.set_progress_bar_config(disable=True)
    done = []
    for i in range(0, len(prompts), part):
        some = prompts[i : i + part]
        generators = [torch.Generator().manual_seed(seed * 100_000 + i + k) for k in range(len(some))]
        with attention(pipe.device):
            done += pipe(some, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return np.stack([np.asarray(image.convert("RGB")) for image in done])


def everything(pipe: Any, world: World, folder: Path, work: Path) -> dict[str, Any]:
    """All figures of the model card: the base's, then each LoRA's presence with it and without it."""
    also = [*HELD_OBJECTS, *HELD_PLACES]
    judge = train_judge(world, also, work / "judge.pt")
    figures: dict[str, Any] = {}
    for kind in ("single", "pair"):
        rows = asked(world, kind, 100)
        figures[kind] = {"base": score(judge, rows, paint(pipe, [r[2] for r in rows])), "judge": itself(judge, world, kind)}
    for file in sorted(folder.glob("*.safetensors")):
        if file.stem in also:
            figures[file.stem] = present(pipe, judge, world, file)
    return figures


def present(pipe: Any, judge: Judge, world: World, file: Path, count: int = 40) -> dict[str, float]:
    """Percent of pictures whose first object (or place) is the LoRA's concept: without the LoRA, and with it."""
    name, result = file.stem, {}
    if name in HELD_OBJECTS:
        prompts = [f"{article(name)} {PLACES[world.places[i % len(world.places)]][0]}" for i in range(count)]
    else:
        prompts = [f"{article(world.objects[i % len(world.objects)])} {HELD_PLACES[name][0]}" for i in range(count)]
    for when in ("without", "with"):
        if when == "with":
            pipe.load_lora_weights(file)
        things, where = read(judge, paint(pipe, prompts))
        found = things[:, 0].argmax(1) if name in HELD_OBJECTS else where.argmax(1)
        known = judge.objects if name in HELD_OBJECTS else judge.places
        result[when] = float((found == known.index(name)).float().mean() * 100)
    pipe.unload_lora_weights()
    return result
