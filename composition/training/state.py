"""The factors in training, their optimiser and the step reached: all that a checkpoint holds."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composition import atomic
from composition.adapters.stack import Stack
from composition.loras.writer import Factors
from composition.request import Refused
from composition.training.plan import Concept, Plan


class State:
    """Adapter k owns its span of ranks in every part; parts are down, up, down, up, ... layer after layer."""

    def __init__(self, stacks: Mapping[str, Mapping[str, Stack]], concepts: Sequence[Concept], plan: Plan) -> None:
        self.stacks, self.plan, self.step = stacks, plan, 0
        self.names, self.origins = [one.name for one in concepts], [one.origin for one in concepts]
        self.parts = [getattr(s, side) for layers in stacks.values() for s in layers.values() for side in ("down", "up")]
        for k, name in enumerate(self.names):
            generator = torch.Generator().manual_seed(random.Random(f"{plan.seed}/{name}").getrandbits(63))
            for layers in stacks.values():
                for stack in layers.values():
                    part = stack.down.data[k * plan.rank : (k + 1) * plan.rank]
                    fresh = torch.rand(part.shape, generator=generator, dtype=torch.float64)
                    part.copy_((fresh * 2 - 1) / part[0].numel() ** 0.5)
        self.optimiser = torch.optim.AdamW(self.parts, lr=plan.rate, betas=(0.9, 0.99), weight_decay=plan.decay)

    def advance(self, losses: Tensor) -> None:
        """Clip each adapter's gradient to length 1, take one step."""
        if not torch.isfinite(losses).all():
            raise RuntimeError(f"the loss is no number at step {self.step}: try a lower rate than {self.plan.rate}")
        for k in range(len(self.names)):
            grads = [self._slice(i, part.grad, k) for i, part in enumerate(self.parts) if part.grad is not None]
            length = torch.stack([g.norm() for g in grads]).norm()
            for g in grads:
                g.mul_((1.0 / (length + 1e-6)).clamp(max=1.0))
        warm = min(1.0, (self.step + 1) / self.plan.warm)
        rate = self.plan.rate * warm * (0.55 + 0.45 * math.cos(math.pi * self.step / self.plan.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1

    def _slice(self, index: int, value: Tensor, k: int) -> Tensor:
        """Adapter k's ranks of part `index`: the first axis of a down (even), the second of an up (odd)."""
        a, b = k * self.plan.rank, (k + 1) * self.plan.rank
        return value[:, a:b] if index % 2 else value[a:b]

    def factors(self, k: int) -> dict[str, dict[str, Factors]]:
        """Adapter k's factors by component and layer, detached, on the CPU."""
        a, b = k * self.plan.rank, (k + 1) * self.plan.rank
        return {c: {path: Factors(s.down.detach()[a:b].cpu(), s.up.detach()[:, a:b].cpu()) for path, s in layers.items()}
                for c, layers in self.stacks.items()}  # fmt: skip

    def save(self, file: Path) -> None:
        """Write the checkpoint whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        held = {"plan": repr(asdict(self.plan)), "names": self.names, "origins": self.origins, "step": self.step,
                    "parts": [p.detach() for p in self.parts], "optimiser": self.optimiser.state_dict()}  # fmt: skip
        atomic.write(file, lambda part: torch.save(held, part))

    def load(self, file: Path) -> None:
        """Go on from a checkpoint. Raises Refused when it is damaged, or of another plan, concepts or pictures."""
        held = _read(file)
        other = next((words for name, words, mine in (
            ("plan", "by another plan", repr(asdict(self.plan))), ("names", "for other concepts", self.names),
            ("origins", "from other pictures, captions or another model", self.origins)) if held[name] != mine), "")
        if other:
            raise Refused(f"{file} was made {other}: give the same flags as then to go on, or delete it to begin again")
        for mine, saved in zip(self.parts, held["parts"], strict=True):
            mine.data.copy_(saved)
        self.optimiser.load_state_dict(held["optimiser"])
        self.step = held["step"]


def reached(file: Path) -> int:
    """The step a checkpoint was written at. Raises Refused when it is damaged."""
    return int(_read(file)["step"])


def _read(file: Path) -> dict[str, Any]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler has no error of its own: damaged bytes end in IndexError, EOFError, KeyError, ...
        held = None
    if not isinstance(held, dict) or not {"plan", "names", "origins", "parts", "optimiser", "step"} <= set(held):
        raise Refused(f"{file} is no checkpoint of a training, or a damaged one: delete it to begin again")
    return held
