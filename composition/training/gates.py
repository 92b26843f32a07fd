"""Trains AutoLoRA's gates for a base: pictures of one to three concepts, with their LoRAs and others on (after arXiv 2508.02107).

Base and LoRAs stay as they are. The first term is the base's own training loss on a picture and a prompt of it, with all LoRAs of the
step added up through the gates: the LoRAs that the prompt names must act, the others must not. The second wants the same noisy picture
to be predicted worse, by a margin, when the prompt asks for other LoRAs of the step: max(0, margin + loss - other loss), in the same
noise, so that it never rewards a bad prediction by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Generator, Tensor, nn

from composition import atomic
from composition.adapters import Adapters
from composition.backbones.base import Backbone
from composition.hooks.kernels import attention_for
from composition.loop import Conditioning, Step
from composition.methods.shared import gating
from composition.refusal import Refused
from composition.request import Lora
from composition.training import noise
from composition.training.precision import HalfBase
from composition.training.state import stored
from composition.training.still import still


class Rows(NamedTuple):
    """A step's pictures, all with the same LoRAs on. weights: of the LoRAs by name, two or more; latents: as the denoiser sees them; prompts:
    one of each picture; others: of each a prompt that does not fit it, "" for none."""

    weights: Mapping[str, float]
    latents: Float[Tensor, "rows C H W"]
    prompts: Sequence[str]
    others: Sequence[str]


@dataclass(frozen=True)
class Plan:
    """How to train. rate: peak of AdamW, warmed up, then a cosine down to a tenth. apart: weight of the second term, 0 leaves it out; margin: by
    which the other loss should be larger. empty: share of prompts replaced by "". noise: as of a concept's plan. half: bfloat16 autocast."""

    kind: gating.Kind = "rank"
    film: bool = True
    shared: bool = False
    steps: int = 1000
    rate: float = 1e-2
    apart: float = 0.5
    margin: float = 0.02
    empty: float = 0.1
    noise: tuple[float, float] | None = None
    warm: int = 25
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < 1 or not 0 <= self.empty < 1 or self.apart < 0 or self.margin < 0:
            raise Refused(f"steps {self.steps}, rate {self.rate:g}, empty {self.empty:g}, apart {self.apart:g}, margin {self.margin:g}: steps are at least 1, "
                          "the rate lies between 0 and 1, empty from 0 to below 1, and no weight is below 0")


Draw = Callable[[int], Rows]  # the rows of a step, by its number alone
OnStep = Callable[[int, float, float], object]  # (steps done, the loss, the share of the second term's margin that is kept)


def train(
    backbone: Backbone, adapters: Adapters, loras: Mapping[str, tuple[Lora, Path, str]], draw: Draw, plan: Plan, file: Path, *, base: str,
    targets: Sequence[str] | None = None, checkpoint: Path | None = None, save_every: int = 200, on_step: OnStep | None = None,
    stop: Callable[[], bool] | None = None, **lines: str,
) -> Path | None:  # fmt: skip
    """Train gates and write their file; None when `stop` ended it before. Goes on from the checkpoint where there is one.

    loras: by name each with its file and category. targets: layers that have gates (None: every layer that any of these LoRAs touches).
    base: the model's name. lines: further ones for the file's header. Raises Refused when the checkpoint is of another plan, RuntimeError for a loss
    that is not finite.
    """
    layers = list(targets) if targets is not None else touched(adapters, loras)
    gates = gating.Gating(gating.Design(plan.kind, base, {path: _width(adapters, path) for path in layers}, plan.film and plan.kind == "rank",
                                        plan.shared and plan.kind == "element")).to(backbone.device)
    optimiser = torch.optim.AdamW(gates.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.0)
    first = _resumed(checkpoint, plan, gates, optimiser)
    learning = _Learning(backbone, adapters, gates, loras, plan)
    with still(adapters.components.values()), learning.lent.restored():
        for step in range(first, plan.steps):
            loss, kept = learning(step, draw(step))
            if not torch.isfinite(loss):
                raise RuntimeError(f"the loss is not finite at step {step}: try a lower rate than {plan.rate:g}")
            nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = _rate(plan, step)
            optimiser.step()
            optimiser.zero_grad()
            if on_step is not None:
                on_step(step + 1, float(loss), float(kept))
            ended = stop is not None and step + 1 < plan.steps and stop()
            if checkpoint is not None and (ended or (step + 1) % save_every == 0):
                _saved(checkpoint, plan, step + 1, gates, optimiser)
            if ended:
                return None
    return gating.write(gates, file, steps=str(plan.steps), loras=str(len(loras)), **lines)


def touched(adapters: Adapters, loras: Mapping[str, tuple[Lora, Path, str]]) -> list[str]:
    """Every layer of the denoiser that one of these LoRAs changes."""
    paths: dict[str, None] = {}
    for name, (lora, path, _) in loras.items():
        with adapters.session([(name, lora, path)]):
            paths |= dict.fromkeys(adapters.stacks())
    return sorted(paths)


def _width(adapters: Adapters, path: str) -> int:
    module = adapters.layer(path)
    if module is None:
        raise Refused(f"this model has no layer {path}")
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


class _Learning:
    """Computes the gradients of a step."""

    def __init__(self, backbone: Backbone, adapters: Adapters, gates: gating.Gating, loras: Mapping[str, tuple[Lora, Path, str]], plan: Plan) -> None:
        self.backbone, self.adapters, self.gates, self.loras, self.plan = backbone, adapters, gates, loras, plan
        self.noise = noise.of(backbone.scheduler)
        self.lent = HalfBase(backbone.denoiser, backbone.device, plan.half)

    def __call__(self, number: int, rows: Rows) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Adds to the gradients; the loss of the first term, and the share of rows that keep the margin."""
        plan, device = self.plan, self.backbone.device
        generator = Generator().manual_seed(plan.seed * 2**32 + number)
        t = self.noise.times(len(rows.latents), plan.noise, generator)
        fresh = torch.randn(rows.latents.shape, generator=generator)
        empty = torch.rand(len(rows.latents), generator=generator) < plan.empty
        noisy, goal = (value.to(device) for value in self.noise.mix(rows.latents.float().cpu(), fresh, t))
        t = t.to(device)
        prompts: list[str] = ["" if empty[i] else prompt for i, prompt in enumerate(rows.prompts)]
        contrasted = [i for i, other in enumerate(rows.others) if other and not empty[i] and plan.apart]
        names = list(rows.weights)
        with self.adapters.session([(name, *self.loras[name][:2]) for name in names]), \
                attention_for(device, positions=noisy.shape[-1] * noisy.shape[-2], gradients=True), self.lent():
            losses = self._losses(rows, noisy, goal, t, prompts)
            total, kept = losses.mean(), losses.new_tensor(1.0)
            if contrasted:
                index = torch.tensor(contrasted, device=device)
                other = self._losses(rows, noisy[index], goal[index], t[index], [rows.others[i] for i in contrasted])
                short = (plan.margin + losses[index] - other).clamp(min=0)
                total, kept = total + plan.apart * short.sum() / len(losses), (short == 0).float().mean()
            total.backward()
        return losses.detach().mean(), kept.detach()

    def _losses(self, rows: Rows, noisy: Tensor, goal: Tensor, t: Num[Tensor, "rows"], prompts: list[str]) -> Float[Tensor, "rows"]:
        """The squared error of each row, with all LoRAs on through the gates."""
        device, step = self.backbone.device, Step(0, 1, t, noisy)
        cond = self._read(rows.weights, prompts)
        gated = (self.adapters.combined(self.gates.combine(self._bases(rows.weights)), rows.weights, step) if self.plan.kind == "element" else
                 self.adapters.routed(self.gates.route([self.loras[name][2] for name in rows.weights]), rows.weights, step))
        with gated, torch.autocast(device.type, torch.bfloat16, enabled=self.plan.half):
            guess = self.backbone.denoise(noisy, t, cond)[0]
        return (guess.float() - goal).square().flatten(1).mean(1)

    def _bases(self, weights: Mapping[str, float]) -> Callable[[str], Tensor]:
        """Directions of the global LoRA by layer, computed once for the step."""
        stacks, values, held = self.adapters.stacks(), list(weights.values()), dict[str, Tensor]()

        def bases(path: str) -> Tensor:
            if path not in held:
                if path not in stacks:
                    return torch.zeros(self.gates.design.layers[path], 0)
                spans = stacks[path].spans
                held[path] = gating.directions(stacks[path], torch.tensor([values[k] for k, (a, b) in enumerate(spans) for _ in range(a, b)]))
            return held[path]

        return bases

    @torch.no_grad()
    def _read(self, weights: Mapping[str, float], prompts: Sequence[str]) -> Conditioning:
        self.adapters.use_text(weights)
        return self.backbone.encode(list(prompts), None)


def _rate(plan: Plan, step: int) -> float:
    cosine = torch.pi * step / plan.steps
    return plan.rate * min(1.0, (step + 1) / plan.warm) * (0.55 + 0.45 * float(torch.tensor(cosine).cos()))


def _saved(file: Path, plan: Plan, step: int, gates: gating.Gating, optimiser: torch.optim.Optimizer) -> None:
    held = {"plan": repr(asdict(plan)), "layers": list(gates.design.layers), "step": step, "gates": gates.state_dict(), "optimiser": optimiser.state_dict()}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, lambda part: stored(held, part))


def reached(file: Path) -> int:
    """The step a checkpoint was written at. Raises Refused when it is damaged."""
    return int(_read(file)["step"])


def _resumed(file: Path | None, plan: Plan, gates: gating.Gating, optimiser: torch.optim.Optimizer) -> int:
    """The step to go on from."""
    if file is None or not file.is_file():
        return 0
    held = _read(file)
    if held["plan"] != repr(asdict(plan)) or held["layers"] != list(gates.design.layers):
        raise Refused(f"{file} was made by another plan or for other LoRAs: give the same flags as then to go on, or delete it to begin again")
    gates.load_state_dict(held["gates"])
    optimiser.load_state_dict(held["optimiser"])
    return int(held["step"])


def _read(file: Path) -> dict[str, Any]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler has no error of its own
        held = None
    if not isinstance(held, dict) or not {"plan", "layers", "step", "gates", "optimiser"} <= set(held):
        raise Refused(f"{file} is damaged: delete it to begin again")
    return held
