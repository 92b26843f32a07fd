"""A LoRA's update in a layer as its singular value decomposition: rank-ones that no longer depend on how a file happened to split it.

B A = U diag(s) V, from a thin QR of both factors and one small SVD (float64, on the processor, where every machine has it). With U's columns
orthonormal the length of a LoRA's output B A x is that of diag(s) V x, and a rank-one's the size of its entry: nothing as wide as the layer.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from composition.adapters.stack import Product


class Singular(NamedTuple):
    """u diag(s) v, s falling. The sign of each rank-one's two sides is fixed: the largest entry of v is positive."""

    u: Float[Tensor, "out r"]
    s: Float[Tensor, "r"]
    v: Float[Tensor, "r in"]


def singular(down: Float[Tensor, "r in"], up: Float[Tensor, "out r"]) -> Singular:
    """Of up @ down, in float64 on the processor. As many ranks as fit into the layer's sides."""
    left, inner = torch.linalg.qr(up.detach().to("cpu", torch.float64))
    right, outer = torch.linalg.qr(down.detach().to("cpu", torch.float64).T)
    u, s, v = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    u, v = left @ u, v @ right.T
    sign = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()[:, 0]
    sign = torch.where(sign == 0, 1.0, sign)
    return Singular(u * sign, s, v * sign[:, None])


def canonical(product: Product) -> Product:
    """The same updates with diag(s) V as `down` and U as `up` of every adapter, as many ranks each (zeros where a layer has no room)."""
    owner = product.owner
    assert owner is not None
    flat, up = product.down.flatten(1), product.up
    downs, ups = torch.zeros_like(flat), torch.zeros_like(up)
    for k in owner.unique().tolist():
        mine = (owner == k).nonzero()[:, 0]
        u, s, v = singular(flat[mine], up[:, mine])
        mine = mine[: len(s)]
        downs[mine], ups[:, mine] = (s[:, None] * v).to(flat), u.to(up)
    return Product(downs.view_as(product.down), ups, owner)
