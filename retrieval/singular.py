"""Singular values and inner products of a LoRA's updates, exactly, from the factors alone: no update is ever formed.

An update is dW = s B A with A (r, in), B (out, r) and s = alpha / rank. What is computed depends on dW alone, not on how it is written as a
product: another basis of the ranks, ranks of zeros, another order of them change nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from composition.loras.kinds.lora import Factors
from composition.loras.products import inner, matrices


def values(factors: Factors) -> Float64[Tensor, "r"]:
    """The singular values of the update, falling; ranks that add nothing have 0.

    By the Gram route: with (sB)^T (sB) = H^T H, they are the roots of the eigenvalues of H A A^T H^T. The smallest are exact to about 1e-8 of the largest.
    """
    down, up = matrices(factors)
    return spectrum(up.mT @ up, down @ down.mT).sqrt()


def spectrum(outer: Float64[Tensor, "*n r r"], inner: Float64[Tensor, "*n r r"]) -> Float64[Tensor, "*n r"]:
    """The squared singular values of updates B A, falling, of B^T B and A A^T: the eigenvalues of their product."""
    squares, basis = torch.linalg.eigh(outer)
    half = squares.clamp_min(0).sqrt()[..., None] * basis.mT
    return torch.linalg.eigvalsh(half @ inner @ half.mT).clamp_min(0).flip(-1)


def cosine(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> float:
    """Of all updates of two files, by layer, as of two vectors: 1 for equal ones, 0 where no layer is in both or one file has no effect."""
    norms = [sum(inner(layer, layer) for layer in file.values()) for file in (first, second)]
    if not min(norms, default=0.0) > 0:
        return 0.0
    shared = sum(inner(first[name], second[name]) for name in first.keys() & second.keys())
    return max(-1.0, min(1.0, shared / (norms[0] * norms[1]) ** 0.5))


@dataclass(frozen=True)
class Figures:
    """What the singular values of a file say of it. strength: the norm of all its updates together. effective_rank: exp of the entropy of a
    layer's energies, spike: the largest one's share of them, 0 to 1; both the mean over layers, each by its own energy. 0, 0, 0 without effect.
    """

    strength: float = 0.0
    effective_rank: float = 0.0
    spike: float = 0.0


def figures(factors: Mapping[str, Factors]) -> Figures:
    """Those of a file's layers (`reader.unplaced`)."""
    total = ranks = spikes = 0.0
    for layer in factors.values():
        energies = values(layer).square()
        energy = energies.sum().item()
        if energy > 0:
            share = energies / energy
            total += energy
            ranks += energy * torch.special.entr(share).sum().exp().item()
            spikes += energy * share[0].item()
    return Figures(total**0.5, ranks / total, spikes / total) if total else Figures()
