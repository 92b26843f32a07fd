"""Inner products of LoRA updates in rank space: from the factors alone, no update is ever formed.

An update is dW = s B A with A (r, in), B (out, r) and s = alpha / rank, a convolution's kernel along its inputs. What is computed depends on
dW alone, not on how it is written as a product.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from composition.loras.kinds.lora import Factors

Pair = tuple[Float64[Tensor, "_ in"], Float64[Tensor, "out _"]]


def matrices(factors: Factors) -> Pair:
    """A and s B in float64; a convolution's kernel lies along its inputs."""
    return factors.stored_down.flatten(1).double(), factors.stored_up.flatten(1).double() * factors.scale


def inner(first: Factors, second: Factors) -> float:
    """<dW1, dW2>, the sum of the products of their entries: tr((B1^T B2) (A2 A1^T)). 0 for updates of different shapes."""
    return gram([matrices(first), matrices(second)])[0, 1].item()


def gram(updates: Sequence[Pair]) -> Float64[Tensor, "K K"]:
    """<dW_i, dW_j> of the updates of one layer; 0 between those of different shapes. Costs two products of all ranks, whatever K is."""
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    shapes = [(down.shape[1], up.shape[0]) for down, up in updates]
    for size in dict.fromkeys(shapes):
        alike = [index for index, other in enumerate(shapes) if other == size]
        down, up = (torch.cat([updates[index][part] for index in alike], dim=part) for part in (0, 1))
        owner = torch.cat([torch.full((len(updates[index][0]),), index) for index in alike])
        by_rank = (up.mT @ up) * (down @ down.mT)
        products += torch.zeros_like(products).index_put((owner[:, None].expand_as(by_rank), owner.expand_as(by_rank)), by_rank, accumulate=True)
    return products


def distance(first: Pair, second: Pair) -> tuple[float, float]:
    """|dW1 - dW2|^2 and |dW1|^2: exactly 0 for equal factors, else to about 1e-15 of the length of dW1, which a difference of inner products would not be."""
    (down, up), (other_down, other_up) = first, second
    length = ((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0).item()
    if down.shape == other_down.shape and torch.equal(down, other_down) and torch.equal(up, other_up):
        return 0.0, length
    outer = torch.linalg.qr(torch.cat([up, -other_up], dim=1), mode="r").R
    rows = torch.linalg.qr(torch.cat([down, other_down]).mT, mode="r").R
    return float((outer @ rows.mT).square().sum()), length
