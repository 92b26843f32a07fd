"""Routing token by token: how much each LoRA would do to a token, and what each one got in the end.

With canonical factors (`shared.canonical`) the length of a LoRA's weighted output B A x is that of its part of A x, so a score costs a few
operations on P numbers a token. Shapes: P ranks of K LoRAs.
"""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from composition.adapters.stack import Stack
from composition.methods.shared.canonical import canonical
from composition.run import Run


def canonically(run: Run) -> AbstractContextManager[None]:
    """All layers with canonical factors while it lasts: the same updates."""
    return run.adapters.rewritten(dict.fromkeys(run.adapters.stacks(), canonical))


def loudness(
    ranks: Float[Tensor, "rows places P"], gate: Float[Tensor, "P"], members: Float[Tensor, "P K"],
) -> Float[Tensor, "rows places K"]:
    """|w_k B_k A_k x| of every token from canonical A x, in float32 or better."""
    wide = torch.promote_types(ranks.dtype, torch.float32)
    return ((ranks.to(wide) * gate.to(wide)).square() @ members.to(wide)).sqrt()


def standardised(loud: Float[Tensor, "rows places K"]) -> Float[Tensor, "rows places K"]:
    """Each LoRA's loudness over its own mean over the places of a row: 1 everywhere for a LoRA that treats all tokens alike, and in a layer
    without places; 0 for one that is off."""
    mean = loud.mean(1, keepdim=True)
    return loud / mean.clamp_min(torch.finfo(loud.dtype).tiny)


def highest(scores: Float[Tensor, "*places n"], count: int) -> Bool[Tensor, "*places n"]:
    """Which of a token's scores are among its `count` highest; equal ones together, so that no order decides."""
    return scores >= scores.topk(min(count, scores.shape[-1]), -1).values[..., -1:]


class Shares:
    """Which LoRA each layer's ranks are of (P, K), and a running sum of what each LoRA got in it (K,), kept where the layers compute."""

    def __init__(self, run: Run) -> None:
        self.run, self.device, count = run, run.backbone.device, len(run.adapters.names)
        self.members: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        for path, layer in run.adapters.stacks().items():
            owner = [k for k, (begin, end) in enumerate(layer.spans) for _ in range(begin, end)]
            self.members[path] = torch.nn.functional.one_hot(torch.tensor(owner), count).float().to(self.device)
            self.sums[path] = torch.zeros(count, device=self.device)
            self.counts[path] = torch.zeros((), device=self.device)

    def spread(self, layer: Stack, gates: Float[Tensor, "rows places K"]) -> Float[Tensor, "rows places P"]:
        """A number for each LoRA as a number for each of its ranks."""
        return gates @ self.members[layer.path].to(gates).T

    def count(self, layer: Stack, gates: Float[Tensor, "rows places K"]) -> None:
        """Add what each LoRA gets at each place, to be divided by the number of places."""
        rows, places, _ = gates.shape
        self.sums[layer.path].add_(gates.sum((0, 1)))
        self.counts[layer.path].add_(rows * places)

    def by_block(self) -> dict[str, dict[str, float]]:
        """What each LoRA got on average at a place, by block of the denoiser ("" outside of all); blocks that were not routed are left out."""
        blocks: dict[str, tuple[Tensor, Tensor]] = {}
        for path in self.sums:
            name = self.run.backbone.block(path)
            total, places = blocks.get(name, (0.0, 0.0))
            blocks[name] = total + self.sums[path], places + self.counts[path]
        names = self.run.adapters.names
        return {block: {name: round(float(value), 4) for name, value in zip(names, (total / places).tolist(), strict=True)}
                for block, (total, places) in sorted(blocks.items()) if places > 0}
