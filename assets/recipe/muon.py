"""Muon for the hidden matrices and kernels, AdamW for the rest (Jordan et al. 2024; scaling of arXiv 2502.16982, eq. 4).

The momentum of a weight is brought to a matrix whose singular values are all near one, so that no direction of a layer is
left behind. The rate means the same as AdamW's: the update's root mean square is 0.2 times the rate. Weights of one shape are
computed as one batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the iteration, Jordan et al.


@torch.no_grad()
def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """(..., m, n) to the nearest orthogonal matrices, roughly: singular values between 0.7 and 1.2."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Weights of two or more axes; a kernel (out, in, h, w) counts as (out, in h w)."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault((weight.shape[0], weight[0].numel()), []).append(weight)
            for shape, weights in alike.items():
                grads = [weight.grad for weight in weights]
                held = [self.state[w].setdefault("held", torch.zeros_like(w)) for w in weights]
                torch._foreach_lerp_(held, grads, 1 - group["momentum"])
                ahead = torch.stack([gradient.flatten(1) for gradient in torch._foreach_lerp(grads, held, group["momentum"])])
                updates = orthogonal(ahead) * (0.2 * max(shape) ** 0.5 * group["lr"])
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(weights, [update.view_as(weight) for update, weight in zip(updates, weights, strict=True)])
