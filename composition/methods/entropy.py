"""Entropy: all LoRAs softly where none stands out, the one that stands out where one does (after DynMoLE, arXiv 2504.00661).

DynMoLE trains a router and looks at the Tsallis entropy of its probabilities: above a threshold a token goes through all experts, each by its
probability; below, through those that the router is sure of. Here the probabilities come from no training: the softmax over LoRAs of
`tokens.standardised` scores (|w_k B_k A_k x| over its mean over the layer's tokens) at a temperature. The entropy is a share of its largest value
for as many LoRAs, so the threshold means the same for 2 and for 5. Soft gates are the probabilities times the number of LoRAs: equal scores are
Merge. Below the threshold the `top` LoRAs keep their own weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from composition.adapters.stack import Stack
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import tokens
from composition.run import Run


@dataclass(frozen=True)
class Options:
    temperature: float = field(default=0.5, metadata={"ge": 0.01, "le": 100.0, "help": "Of the softmax: lower makes one LoRA stand out more."})
    threshold: float = field(default=0.9, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the largest possible entropy from which on all LoRAs act; 0: always, 1: only where all are equal."})
    index: float = field(default=1.5, metadata={"ge": 0.1, "le": 10.0, "help": "Tsallis' entropic index q; 1 is Shannon's entropy."})
    top: int = field(default=1, metadata={"ge": 1, "le": 64, "help": "LoRAs that act on a token below the threshold."})


@method(title="Entropy", about="Token by token, the one LoRA that clearly stands out, or else a soft mix of all.", paper="2504.00661", ranks="some")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    shares = tokens.Shares(run)
    soft_sums = {path: torch.zeros((), device=shares.device) for path in shares.sums}

    def route(layer: Stack, step: Step, ranks: Float[Tensor, "rows places P"], gate: Float[Tensor, "P"]) -> Float[Tensor, "rows places P"]:
        loud = tokens.loudness(ranks, gate, shares.members[layer.path])
        gates, soft = hybrid(tokens.standardised(loud), loud.mean(1, keepdim=True) > 0, options)
        shares.count(layer, gates)
        soft_sums[layer.path].add_(soft.sum())
        return gate * shares.spread(layer, gates).to(gate)

    with tokens.canonically(run):
        def predict(step: Step) -> Prediction:
            return Prediction(run.guide(run.denoise(step, route=route if len(run.live(step)) > 1 else None)), step.latents)

        yield predict
    places = float(sum(shares.counts.values(), torch.zeros(())))
    run.notes["entropy"] = {"gates": shares.by_block(), "soft": round(float(sum(soft_sums.values())) / places, 4) if places else 1.0}


def hybrid(
    scores: Float[Tensor, "rows places K"], live: Bool[Tensor, "rows 1 K"], options: Options,
) -> tuple[Float[Tensor, "rows places K"], Bool[Tensor, "rows places 1"]]:
    """What to multiply each LoRA's weight by at each place, and where that is soft. live: which LoRAs do anything in a row."""
    chances = (scores / options.temperature).masked_fill(~live, -torch.inf).softmax(-1)
    chances = torch.where(live, chances, 0.0)
    count = live.sum(-1, keepdim=True).to(scores)
    soft = tsallis(chances, options.index) >= options.threshold * _largest(count, options.index) - 1e-6
    sure = (tokens.highest(chances, options.top) & live).to(scores)
    return torch.where(soft, chances * count, sure), soft


def tsallis(chances: Float[Tensor, "*places K"], index: float) -> Float[Tensor, "*places 1"]:
    """(1 - sum p^q) / (q - 1); Shannon's at q = 1."""
    if index == 1.0:
        return torch.special.entr(chances).sum(-1, keepdim=True)
    return (1 - torch.where(chances > 0, chances, 1.0).pow(index).where(chances > 0, 0.0).sum(-1, keepdim=True)) / (index - 1)


def _largest(count: Float[Tensor, "rows 1 1"], index: float) -> Float[Tensor, "rows 1 1"]:
    """The entropy of `count` equal chances."""
    count = count.clamp_min(1)
    return count.log() if index == 1.0 else (1 - count.pow(1 - index)) / (index - 1)
