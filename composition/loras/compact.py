"""Factors of a layer made ready to be written: ranks that do nothing left out, numbers even between the two, and fewer ranks if asked."""

import torch
from jaxtyping import Float
from torch import Tensor

Pair = tuple[Float[Tensor, "r in *kernel"], Float[Tensor, "out r"]]  # down, up


def live(down: Float[Tensor, "P in *kernel"], up: Float[Tensor, "out P"]) -> Pair:
    """Without the ranks whose product is zero; none may be left."""
    kept = (down.flatten(1) != 0).any(1) & (up != 0).any(0)
    return down[kept], up[:, kept]


def even(down: Float[Tensor, "r in *kernel"], up: Float[Tensor, "out r"]) -> Pair:
    """The same product, the largest numbers of each rank alike in both factors up to a power of two: exact, and half precision keeps most of it."""
    largest = [factor.abs().amax(1).clamp(min=torch.finfo(factor.dtype).tiny) for factor in (down.flatten(1), up.T)]
    scale = torch.exp2(((largest[1].log2() - largest[0].log2()) / 2).round())
    return down * scale.view(-1, *[1] * (down.ndim - 1)), up / scale


def truncated(down: Float[Tensor, "P in *kernel"], up: Float[Tensor, "out P"], rank: int) -> tuple[Pair, float, float]:
    """The nearest product of at most this rank, with what is kept of the energy |up @ down|^2 and what there was.

    By the singular values of a P x P matrix; float64.
    """
    left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.flatten(1).double().T)
    outer, values, inner = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    energy = values.square()
    root = values[:rank].sqrt()
    if down.shape[0] > rank:
        small = (root[:, None] * (inner[:rank] @ right.Q.T)).view(-1, *down.shape[1:]), left.Q @ outer[:, :rank] * root
        return (small[0].to(down), small[1].to(up)), float(energy[:rank].sum()), float(energy.sum())
    return (down, up), float(energy.sum()), float(energy.sum())
