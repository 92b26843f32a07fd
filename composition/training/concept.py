"""Concept LoRAs: learn one or many new concepts on any UNet backbone, from pictures with prompts (arXiv 2106.09685).

Many concepts train in one batch of rows, each row with its own adapter; the loss is a sum over adapters and gradients
are clipped adapter by adapter, so a concept trained in company is the one trained alone. Every random number of a step
follows from (seed, concept, step): a run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from composition.adapters import Adapters
from composition.backbones.base import Backbone
from composition.request import Refused
from composition.sampler import Conditioning
from composition.stack import Stack
from composition.training.lorafile import Factors, write

# Layers by what they are, as pieces of their paths; "text" is every projection of the text encoders.
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "projection": ("proj_in", "proj_out"),
    "convolution": ("conv1", "conv2", "conv_shortcut"),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}


@dataclass(frozen=True)
class Plan:
    """How to train. rate: peak of AdamW, warmed up, then a cosine down to a tenth. batch: rows per concept and step.

    noise: None draws timesteps evenly; (centre, width) draws ln sigma from that normal distribution, besides a tenth
    evenly. empty: the share of prompts replaced by "", which keeps guidance working. half: bfloat16 autocast.
    """

    rank: int = 8
    alpha: float | None = None
    rate: float = 1e-3
    steps: int = 500
    batch: int = 8
    targets: tuple[str, ...] = ("attention", "feed_forward")
    noise: tuple[float, float] | None = None
    empty: float = 0.1
    warm: int = 25
    decay: float = 0.0
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        strange = set(self.targets) - set(TARGETS)
        if strange or not self.targets:
            raise Refused(f"targets {sorted(strange)} are unknown; choose from {', '.join(TARGETS)}")
        if min(self.rank, self.steps, self.batch) < 1:
            raise Refused(f"rank, steps and batch must be at least 1, not {self.rank}, {self.steps}, {self.batch}")


@dataclass(frozen=True, eq=False)
class Concept:
    """What one adapter learns from: latents (n, C, H, W) as the denoiser sees them, and a prompt for each."""

    name: str
    latents: Float[Tensor, "n C H W"]
    prompts: Sequence[str]
    metadata: Mapping[str, str] = field(default_factory=dict)  # title, category, trigger_words, base, ...

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.prompts) or not len(self.prompts):
            raise Refused(f"{self.name}: {len(self.latents)} pictures and {len(self.prompts)} prompts; give one each")


@torch.no_grad()
def latents_of(backbone: Backbone, pixels: Float[Tensor, "n 3 height width"], part: int = 64) -> Float[Tensor, "n C H W"]:
    """Pictures in -1..1 as the denoiser sees them: encoded and scaled."""
    vae = backbone.pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    coded = [vae.encode(some.to(vae.device, vae.dtype)).latent_dist.mode() for some in pixels.split(part)]
    return (torch.cat(coded) - shift) * vae.config.scaling_factor


def train(
    backbone: Backbone, adapters: Adapters, concepts: Sequence[Concept], plan: Plan, folder: Path, *,
    checkpoint: Path | None = None, save_every: int = 100, on_step: Callable[[int, dict[str, float]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Path]:
    """Train one adapter per concept and write `folder/<name>.safetensors`; returns the files by name.

    checkpoint: saved every `save_every` steps and at a stop, and continued from when it exists. on_step: (step, loss of
    each concept). stop: asked after each step; when it says True training ends there, and only the checkpoint is written.
    """
    names = [concept.name for concept in concepts]
    if len(set(names)) != len(names):
        raise Refused(f"concepts must have different names, not {', '.join(names)}")
    layers = choose(backbone.components, plan.targets)
    with _still(backbone.components), adapters.training(names, plan.rank, layers, alpha=plan.alpha) as stacks:
        state = _State(stacks, names, plan)
        if checkpoint and checkpoint.is_file():
            state.load(checkpoint)
        batches = _Batches(backbone, adapters, concepts, plan)
        for step in range(state.step, plan.steps):
            losses = _learn(backbone, adapters, state, batches.draw(step), plan)
            state.advance(losses)
            if on_step:
                on_step(state.step, dict(zip(names, losses.tolist(), strict=True)))
            stopped = stop is not None and stop()
            if checkpoint and (stopped or state.step % save_every == 0):
                state.save(checkpoint)
            if stopped:
                return {}
        files = {}
        for k, concept in enumerate(concepts):
            files[concept.name] = folder / f"{concept.name}.safetensors"
            write(files[concept.name], state.factors(k), plan.rank, plan.alpha, concept.metadata)
        return files


def choose(components: Mapping[str, nn.Module], targets: Sequence[str]) -> dict[str, list[str]]:
    """The layers to train, by component: the denoiser's that the targets name, the text encoders' with "text"."""
    chosen: dict[str, list[str]] = {}
    for component, model in components.items():
        text = component.startswith("text_encoder")
        ends = [end for target in targets if (target == "text") == text for end in TARGETS[target]]
        paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
                 and any(f".{path}".endswith(f".{end}") for end in ends)]  # fmt: skip
        if paths:
            chosen[component] = paths
    return chosen


@contextmanager
def _still(components: Mapping[str, nn.Module]) -> Iterator[None]:
    """The base neither learns nor drops out while the context lasts."""
    modes = [(module, module.training) for model in components.values() for module in model.modules()]
    wanted = [p for model in components.values() for p in model.parameters() if p.requires_grad]
    try:
        for model in components.values():
            model.eval()
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


class _Batch:
    """One step's rows, adapter after adapter: noisy (K*batch, C, H, W), t (K*batch,), goal, and what they read."""

    def __init__(self, noisy: Tensor, t: Tensor, goal: Tensor, cond: Conditioning, count: int) -> None:
        self.noisy, self.t, self.goal, self.cond, self.count = noisy, t, goal, cond, count


class _Batches:
    """Draws the rows of a step; prompts are read once unless the text encoder learns too."""

    def __init__(self, backbone: Backbone, adapters: Adapters, concepts: Sequence[Concept], plan: Plan) -> None:
        self.backbone, self.adapters, self.concepts, self.plan = backbone, adapters, concepts, plan
        self.kept = backbone.scheduler.alphas_cumprod.double()
        self.log_sigma = ((1 - self.kept) / self.kept).sqrt().log()
        self.kind = backbone.scheduler.config.prediction_type
        self.read: dict[str, dict[str, Tensor]] = {}

    def draw(self, step: int) -> _Batch:
        rows = [self._rows(concept, step) for concept in self.concepts]
        device = self.backbone.device
        noisy, t, goal = (torch.cat(part).to(device) for part in zip(*((a, b, c) for a, b, c, _ in rows), strict=True))
        values = [self._encoded(k, row[3]) for k, row in enumerate(rows)]
        cond = Conditioning({key: torch.cat([v[key] for v in values], 1) for key in values[0]})
        return _Batch(noisy, t, goal, cond, len(rows))

    def _rows(self, concept: Concept, step: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        name = f"{self.plan.seed}/{concept.name}/{step}"
        rng = random.Random(name)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        size = self.plan.batch
        pick = torch.randint(len(concept.prompts), (size,), generator=generator)
        latents = concept.latents[pick].cpu()
        noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
        t = self._times(size, generator)
        kept = self.kept[t].to(latents.dtype).view(-1, 1, 1, 1)
        a, s = kept.sqrt(), (1 - kept).sqrt()
        goals = {"epsilon": lambda: noise, "v_prediction": lambda: a * noise - s * latents, "sample": lambda: latents}
        if self.kind not in goals:
            raise Refused(f"this base predicts {self.kind!r}; concepts can be trained on {', '.join(goals)}")
        prompts = ["" if rng.random() < self.plan.empty else concept.prompts[int(i)] for i in pick]
        return a * latents + s * noise, t, goals[self.kind](), prompts

    def _times(self, size: int, generator: torch.Generator) -> Tensor:
        even = torch.randint(len(self.kept), (size,), generator=generator)
        if self.plan.noise is None:
            return even
        centre, width = self.plan.noise
        wanted = torch.randn(size, generator=generator, dtype=torch.float64) * width + centre
        drawn = torch.searchsorted(self.log_sigma, wanted).clamp(max=len(self.kept) - 1)
        return torch.where(torch.rand(size, generator=generator) < 0.1, even, drawn)

    def _encoded(self, k: int, prompts: list[str]) -> dict[str, Tensor]:
        """(1, batch, ...) tensors. With a text part, read anew with the gradient on; else each prompt once."""
        if "text" in self.plan.targets:
            self.adapters.use_text({self.concepts[k].name: 1.0})
            try:
                return dict(self.backbone.encode(prompts, None).values)
            finally:
                self.adapters.use_text({})
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.read:
                with torch.no_grad():
                    self.read[prompt] = dict(self.backbone.encode([prompt], None).values)
        return {key: torch.cat([self.read[p][key] for p in prompts], 1) for key in self.read[prompts[0]]}


def _learn(backbone: Backbone, adapters: Adapters, state: _State, batch: _Batch, plan: Plan) -> Tensor:
    """Gradients of one step; returns the loss of each adapter, (K,)."""
    weights = [{name: 1.0} for name in state.names for _ in range(plan.batch)]
    half = torch.autocast(backbone.device.type, torch.bfloat16, enabled=plan.half)
    with adapters.rows(weights), half:
        guess = _evaluate(backbone, batch)
    each = F.mse_loss(guess.to(batch.goal), batch.goal, reduction="none").unflatten(0, (batch.count, -1))
    losses = each.flatten(1).mean(1)
    losses.sum().backward()
    return losses.detach()


def _evaluate(backbone: Backbone, batch: _Batch) -> Tensor:
    """The UNet's answer with a time of its own for every row, which `Backbone.denoise` (one time for all) has no room for."""
    values = {key: value[0].to(batch.noisy.dtype) for key, value in batch.cond.values.items()}
    extra = None
    if "pooled" in values:  # SDXL: pooled text, and the picture's size as if never cropped
        factor = backbone.pipeline.vae_scale_factor
        high, wide = (side * factor for side in batch.noisy.shape[-2:])
        sizes = batch.noisy.new_tensor([[high, wide, 0, 0, high, wide]]).expand(len(batch.noisy), -1)
        extra = {"text_embeds": values["pooled"], "time_ids": sizes}
    answer = backbone.denoiser(
        batch.noisy, batch.t, encoder_hidden_states=values["text"], added_cond_kwargs=extra, return_dict=False)
    return answer[0]


class _State:
    """The factors, their optimiser and the step reached: all that a checkpoint holds."""

    def __init__(self, stacks: Mapping[str, Mapping[str, Stack]], names: Sequence[str], plan: Plan) -> None:
        self.stacks, self.names, self.plan, self.step = stacks, list(names), plan, 0
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
        half = file.with_suffix(".part")
        torch.save({"plan": repr(asdict(self.plan)), "names": self.names, "step": self.step,
                    "parts": [p.detach() for p in self.parts], "optimiser": self.optimiser.state_dict()}, half)  # fmt: skip
        half.replace(file)

    def load(self, file: Path) -> None:
        held = torch.load(file, map_location="cpu", weights_only=True)
        if held["plan"] != repr(asdict(self.plan)) or held["names"] != self.names:
            raise Refused(f"{file} was made by another plan or for other concepts; delete it to begin again")
        for mine, saved in zip(self.parts, held["parts"], strict=True):
            mine.data.copy_(saved)
        self.optimiser.load_state_dict(held["optimiser"])
        self.step = held["step"]
