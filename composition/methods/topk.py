"""Top-k: of all LoRAs, a token passes through the few that would change it most (after MeteoRA, arXiv 2405.13053, and LLaVA-MoLE, 2401.16160).

The papers train a router for a fixed set of LoRAs in every layer. Here nothing is trained: a LoRA's score at a token is the length of its
weighted update |w_k B_k A_k x| over that length's mean over the layer's tokens in the same row, so that a loud LoRA wins where it is loud for
its own measure, not everywhere. The `top` LoRAs keep their weights, the others are off; in layers without places (time embeddings, modulation)
all scores are equal and all act, as in Merge.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from composition.adapters.stack import Stack
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import tokens
from composition.run import Run


@dataclass(frozen=True)
class Options:
    top: int = field(default=2, metadata={"ge": 1, "le": 64, "help": "LoRAs that act on a token in a layer."})
    renormalize: bool = field(default=False, metadata={"help":
        "Scale the weights of those that act so that they add up to the weights of all: a picture as strong as Merge's."})


@method(title="Top-k", about="Each token passes through the few LoRAs that would change it most, layer by layer.", paper="2405.13053", ranks="some")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    shares = tokens.Shares(run)

    def route(layer: Stack, step: Step, ranks: Float[Tensor, "rows places P"], gate: Float[Tensor, "P"]) -> Float[Tensor, "rows places P"]:
        members = shares.members[layer.path]
        loud = tokens.loudness(ranks, gate, members)
        kept = (tokens.highest(tokens.standardised(loud), options.top) & (loud > 0)).to(loud)
        shares.count(layer, kept)
        if options.renormalize:
            weight = (gate.to(loud).abs() @ members.to(loud)) / members.to(loud).sum(0).clamp_min(1)  # of each LoRA, 0 where it is off
            alive = (loud.mean(1, keepdim=True) > 0) * weight
            kept = kept * (alive.sum(-1, keepdim=True) / (kept * weight).sum(-1, keepdim=True).clamp_min(1e-12))
        return gate * shares.spread(layer, kept).to(gate)

    with tokens.canonically(run):
        def predict(step: Step) -> Prediction:
            few = len(run.live(step)) <= options.top
            return Prediction(run.guide(run.denoise(step, route=None if few else route)), step.latents)

        yield predict
    run.notes["topk"] = {"share of tokens": shares.by_block()}
