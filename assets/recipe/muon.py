"""Muon for the hidden matrices and kernels, AdamW for the rest (Jordan et al. 2024; scaling of arXiv 2502.16982, eq. 4).

The momentum of a weight is brought to a matrix whose singular values are all near one, so that no direction of a layer is
left behind. The rate means the same as AdamW's: the update's root mean square is 0.2 times the rate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the iteration, Jordan et al.


@torch.no_grad()
def orthogonal(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """(m, n) to its nearest orthogonal matrix, roughly: singular values between 0.7 and 1.2."""
    a, b, c = QUINTIC
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Weights of two or more axes; a kernel (out, in, h, w) counts as (out, in h w)."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                held = state.setdefault("held", torch.zeros_like(weight))
                held.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(held, group["momentum"]).flatten(1)
                update = orthogonal(ahead) * (0.2 * max(ahead.shape) ** 0.5)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view_as(weight), alpha=group["lr"])
