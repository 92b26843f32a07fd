"""Classifier-free guidance over the rows of a prediction (arXiv 2207.12598) and its rescaling (arXiv 2305.08891)."""

from jaxtyping import Float
from torch import Tensor


def guide(rows: Float[Tensor, "R B *S"], scale: float) -> Float[Tensor, "B *S"]:
    """negative + scale * (positive - negative); a single row is returned as it is."""
    if rows.shape[0] == 1:
        return rows[0]
    negative, positive = rows
    return negative + scale * (positive - negative)


def rescale(
    guided: Float[Tensor, "B *S"], positive: Float[Tensor, "B *S"], factor: float
) -> Float[Tensor, "B *S"]:
    """Bring the guided prediction's spread back to the positive one's, by `factor` 0..1 (2305.08891, section 3.4)."""
    over = tuple(range(1, guided.ndim))
    matched = guided * (positive.std(over, keepdim=True) / guided.std(over, keepdim=True))
    return factor * matched + (1 - factor) * guided
