"""CLoRA's loss on attention maps: maps of one concept alike, of different concepts apart (arXiv 2403.19776, equation 4).

NT-Xent over ordered pairs (a, p) of one concept: -log(e^(s_ap / tau) / (e^(s_ap / tau) + sum over n of other concepts of
e^(s_an / tau))), s the cosine of the flattened maps; other maps of the anchor's concept are not in the denominator.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def nt_xent(maps: Float[Tensor, "B M n"], concepts: Sequence[int], temperature: float = 0.5) -> Float[Tensor, " B"]:
    """The loss of each picture. maps: M of them, flattened; concepts: which concept each is of.

    0 with fewer than two concepts. Raises ValueError when no concept has two maps: nothing would be pulled together.
    """
    kind = torch.tensor(concepts, device=maps.device)
    same = (kind[:, None] == kind[None]) & ~torch.eye(len(concepts), dtype=torch.bool, device=maps.device)
    other = kind[:, None] != kind[None]
    if not same.any():
        raise ValueError("no concept has two maps: the loss needs at least two of one concept")
    if not other.any():
        return maps.sum((1, 2)) * 0
    unit = F.normalize(maps, dim=-1)
    alike = unit @ unit.transpose(1, 2) / temperature
    apart = alike.masked_fill(~other, float("-inf")).logsumexp(-1, keepdim=True)
    pairs = torch.logaddexp(alike, apart) - alike
    return pairs[:, same].mean(-1)


def bounds(concepts: Sequence[int], temperature: float = 0.5) -> tuple[float, float]:
    """(least, flat) of the loss for maps that are nowhere negative: all concepts separate, and all maps equal.

    For equally many maps of each concept: ln(1 + n e^(-1 / tau)) and ln(1 + n), n the maps of other concepts.
    """
    maps = torch.zeros(2, len(concepts), len(concepts), dtype=torch.float64)
    kinds = sorted(set(concepts))
    for index, kind in enumerate(concepts):
        maps[0, index, kinds.index(kind)] = 1.0
    maps[1, :, 0] = 1.0
    least, flat = nt_xent(maps, concepts, temperature).tolist()
    return least, flat
