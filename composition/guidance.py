"""Classifier-free guidance over the rows of a prediction (arXiv 2207.12598)."""

from jaxtyping import Float
from torch import Tensor


def guide(rows: Float[Tensor, "R B *S"], scale: float) -> Float[Tensor, "B *S"]:
    """negative + scale * (positive - negative); a single row is returned as it is."""
    if rows.shape[0] == 1:
        return rows[0]
    negative, positive = rows
    return negative + scale * (positive - negative)
