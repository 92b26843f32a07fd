"""Ranks: a token passes through the strongest rank-ones of all LoRAs together (the idea of SMoRA, arXiv 2501.15103, MoRA and FlyLoRA).

SMoRA trains one LoRA whose ranks are experts behind a router. Here the experts are the rank-ones u_i s_i v_i of each LoRA's singular value
decomposition, and nothing is trained: the score of one at a token is the length of what it adds, |w s_i v_i x|. The token keeps as many as the
largest single LoRA has in that layer, at their own weights: it pays for one LoRA and chooses where from. Loud LoRAs keep more ranks; that is
meant, since the strongest rank-ones of a sum are its best approximation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from composition.adapters.stack import Stack
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import tokens
from composition.methods.shared.factors import adapters_of
from composition.run import Run


@dataclass(frozen=True)
class Options:
    share: float = field(default=1.0, metadata={"ge": 0.05, "le": 64.0, "help":
        "Ranks that act on a token in a layer, in ranks of the largest LoRA; as many as there are LoRAs: nearly Merge."})


@method(title="Ranks", about="Each token passes through the strongest ranks of all LoRAs, as many as one LoRA has.", paper="2501.15103", ranks="some")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    shares = tokens.Shares(run)

    def route(layer: Stack, step: Step, ranks: Float[Tensor, "rows places P"], gate: Float[Tensor, "P"]) -> Float[Tensor, "rows places P"]:
        scores = (ranks * gate).to(torch.promote_types(ranks.dtype, torch.float32)).abs()
        kept = (tokens.highest(scores, kept_of(layer)) & (scores > 0)).to(scores)
        shares.count(layer, kept @ shares.members[layer.path].to(kept))
        return gate * kept.to(gate)

    def kept_of(layer: Stack) -> int:
        """How many ranks a token keeps in a layer: of those that are live in this step."""
        return max(1, round(options.share * max(layer.spans[k][1] - layer.spans[k][0] for k in live)))

    live: list[int] = []
    with tokens.canonically(run):
        def predict(step: Step) -> Prediction:
            live[:] = adapters_of(run, tuple(run.live(step)))
            whole = len(live) == 1 and options.share >= 1
            return Prediction(run.guide(run.denoise(step, route=None if whole else route)), step.latents)

        yield predict
    run.notes["ranks"] = {"ranks a token": shares.by_block()}
