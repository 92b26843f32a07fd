"""The nearest product of a given rank to an update that is no LoRA, by its singular values (Eckart and Young).

Of updates alone that do not ask for the base's weight: LoHa, LoKr and full differences. A Kronecker product's singular values are the products of
those of its two matrices, so it is never formed.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from composition.loras.fused import Part
from composition.loras.kinds.base import Update
from composition.loras.kinds.full import Full
from composition.loras.kinds.loha import LoHa
from composition.loras.kinds.lokr import LoKr
from composition.loras.kinds.lora import Factors

Parts = tuple[Float64[Tensor, "out n"], Float64[Tensor, "n"], Float64[Tensor, "n in"]]


def nearest(update: Update, size: tuple[int, ...], rank: int) -> tuple[Factors, float] | None:
    """The LoRA, in float64, and |D - LoRA|^2 of what it leaves out; None for a kind whose change depends on the base's weight.

    size: of the layer's weight (out, in, *kernel).
    """
    if isinstance(update, LoKr) and update.rows[1:] == Part("")[1:]:
        outer, values, inner = _kronecker(update, rank)
        whole = _length(update)
    elif isinstance(update, LoHa | LoKr) or isinstance(update, Full) and update.weight is not None and update.bias is None:
        outer, values, inner = torch.linalg.svd(update.delta(torch.empty(size, dtype=torch.float64)).flatten(1), full_matrices=False)
        whole = float(values.square().sum())
    else:
        return None
    outer, values, inner = outer[:, :rank], values[:rank], inner[:rank]
    root = values.sqrt()
    left = max(whole - float(values.square().sum()), 0.0)
    return Factors((root[:, None] * inner).view(-1, *size[1:]), outer * root), left if left > 1e-24 * whole else 0.0


def _kronecker(update: LoKr, rank: int) -> Parts:
    """The largest `rank` singular values of its product, and their vectors: pairs of those of the two sides."""
    small, large = update.sides(torch.device("cpu"), torch.float64)
    first, second = (torch.linalg.svd(side, full_matrices=False) for side in (small, large.flatten(1)))
    values = torch.outer(first.S, second.S).flatten()
    chosen = values.argsort(descending=True, stable=True)[:rank]
    i, j = chosen // len(second.S), chosen % len(second.S)
    outer = torch.einsum("an,cn->acn", first.U[:, i], second.U[:, j]).flatten(0, 1)
    inner = torch.einsum("nb,nd->nbd", first.Vh[i], second.Vh[j]).flatten(1)
    return outer, values[chosen], inner


def _length(update: LoKr) -> float:
    """|D|^2."""
    small, large = update.sides(torch.device("cpu"), torch.float64)
    return float(small.square().sum() * large.square().sum())
