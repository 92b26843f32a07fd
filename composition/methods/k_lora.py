"""K-LoRA: each layer belongs to the content early and to the style late, and changes at a step of its own (arXiv 2502.18461, CVPR 2025).

LoRAs of category style are the style, all others the content; several of one role are one dense sum, with their weights and alpha in it (the
authors' code leaves alpha out). In each layer S_c and S_s are the sums of the K largest |entries| of the two sums, K the product of their ranks,
and gamma is the mean over layers of sum |content| / sum |style|, without layers above three times that mean. At a share p of the steps the layer
is the content's where S_c / gamma > S_s S(p), else the style's, whole: S(p) = scale p + offset; on FLUX, as the authors have it there,
(scale p + offset + 0.775) mod scale. All of it is known beforehand, so a step costs one evaluation. A layer that only one role touches is always
that role's. Without both roles it is Merge.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from composition.adapters.stack import Stack
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared.roles import parted
from composition.run import Run

TURN = 0.775  # what the authors add on FLUX: 0.5 becomes 1.275
OUTLIER = 3.0  # layers with a ratio of so many times the mean do not count


@dataclass(frozen=True)
class Options:
    scale: float = field(default=1.5, metadata={"ge": 0.01, "le": 100.0, "help": "How much the style's score gains from the first step to the last."})
    offset: float = field(default=0.5, metadata={"ge": 0.0, "le": 100.0, "help": "What the style's score is multiplied by at the first step."})
    turn: Literal["family", "never", "always"] = field(default="family", metadata={"help":
        "Whether the gain starts high and begins anew, as the authors have it for FLUX: by the model's family, never, always."})


class Scores(NamedTuple):
    """A layer's sums of the largest entries, for both roles, and the ratio of the sums of all of them."""

    content: float
    style: float
    ratio: float


@method(title="K-LoRA", about="Each layer uses the content LoRA first and goes over to the style LoRA at a step of its own; needs both.", paper="2502.18461", ranks="all")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    schedule = _Schedule(run, options)

    def predict(step: Step) -> Prediction:
        return Prediction(run.guide(run.denoise(step, route=schedule.gates if schedule.at(step) else None)), step.latents)

    yield predict


class _Schedule:
    """The gates of all ranks at a step: 1 for the role that has the layer, 0 for the other."""

    def __init__(self, run: Run, options: Options) -> None:
        self.run, self.options = run, options
        self.turning = options.turn == "always" or options.turn == "family" and run.backbone.family == "flux"
        self.live: dict[str, float] = {}
        self.scores: dict[str, Scores] = {}
        self.gamma = 1.0
        layers = run.adapters.stacks()
        self.flat = torch.ones(sum(layer.spans[-1][1] for layer in layers.values()), device=run.backbone.device)
        parts = self.flat.split([layer.spans[-1][1] for layer in layers.values()])
        self.by_layer: dict[str, Tensor] = dict(zip(layers, parts, strict=True))

    def gates(self, layer: Stack, step: Step, ranks: Float[Tensor, "rows places P"], gate: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        return gate * self.by_layer[layer.path].to(gate)

    def at(self, step: Step) -> bool:
        """Whether both roles are live at this step; the gates are then set."""
        live = self.run.live(step)
        content, style = parted(self.run, live)
        if not content or not style:
            if len(live) > 1:
                self.run.notes["k-lora"] = "k-lora takes a LoRA of category style and one of another category: these were added up, as by merge"
            return False
        if live != self.live:
            self._score(live, style)
        names, share = self.run.adapters.names, step.index / step.count
        values = []
        for path, layer in self.run.adapters.stacks().items():
            scores = self.scores.get(path)
            late = scores is not None and not self._content(scores, share)
            early = scores is not None and not late
            off = {k for k, name in enumerate(names) if early and name in style or late and name not in style}
            values += [0.0 if k in off else 1.0 for k, (begin, end) in enumerate(layer.spans) for _ in range(begin, end)]
        self.flat.copy_(torch.tensor(values))
        return True

    def _content(self, scores: Scores, share: float) -> bool:
        """Whether a layer is the content's after this share of the steps."""
        gain = self.options.scale * share + self.options.offset
        if self.turning:
            gain = (gain + TURN) % self.options.scale
        return scores.content / self.gamma > scores.style * gain

    def _score(self, live: Mapping[str, float], style: Collection[str]) -> None:
        """Both roles' scores in every layer that both touch, one layer's updates at a time; and where the layers change in the notes."""
        names = self.run.adapters.names
        weights = {role: [live.get(name, 0.0) if (name in style) is role else 0.0 for name in names] for role in (False, True)}
        self.scores = {}
        for path, layer in self.run.adapters.stacks().items():
            spans = {role: [layer.spans[k] for k, weight in enumerate(weights[role]) if weight and layer.touches(k)] for role in weights}
            if not all(spans.values()):
                continue
            count = 1
            for each in spans.values():
                count *= sum(end - begin for begin, end in each)
            (content, whole), (other, all_style) = (self._sums(layer, weights[role], count) for role in (False, True))
            self.scores[path] = Scores(content, other, whole / all_style if all_style else float("inf"))
        self.live, self.gamma = dict(live), gamma([scores.ratio for scores in self.scores.values()])
        self.run.notes["k-lora"] = {
            "content": [name for name in live if name not in style], "style": [name for name in live if name in style],
            "gamma": round(self.gamma, 4), "style from": {path: self._change(scores) for path, scores in self.scores.items()}}

    def _sums(self, layer: Stack, weights: list[float], count: int) -> tuple[float, float]:
        """The sum of the `count` largest |entries| of the weighted update, and that of all of them."""
        exact = self.run.backbone.dtype == torch.float64
        update = layer.delta(weights, self.flat.device, torch.float64 if exact else torch.float32).flatten().abs_()
        return float(update.topk(min(count, len(update)), sorted=False).values.sum()), float(update.sum())

    def _change(self, scores: Scores) -> float:
        """The share of the steps from which a layer is the style's; 1 for never. Where the gain begins anew it is the content's once more."""
        bound = scores.content / self.gamma / scores.style if scores.style else float("inf")
        first = self.options.offset + (TURN if self.turning else 0.0)
        if self.turning:
            first %= self.options.scale
        return round(min(max((bound - first) / self.options.scale, 0.0), 1.0), 4)


def gamma(ratios: list[float]) -> float:
    """The mean of the finite ratios without those above OUTLIER times it; 1 where there is none."""
    finite = [ratio for ratio in ratios if ratio < float("inf")]
    mean = sum(finite) / len(finite) if finite else 1.0
    kept = [ratio for ratio in finite if ratio <= OUTLIER * mean]
    return (sum(kept) / len(kept) if kept else 1.0) or 1.0
