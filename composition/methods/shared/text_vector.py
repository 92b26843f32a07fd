"""A text as one vector, by which W-Switch and W-Composite compare trigger words with the prompt (arXiv 2606.03792)."""

from jaxtyping import Float
from torch import Tensor

from composition.run import Run


def text_vector(run: Run, text: str) -> Float[Tensor, " D"]:
    """The mean over all positions of the text encoder's output, without any LoRA."""
    return run.encode(run.spelling.text(text), use={}).values["text"][-1, 0].float().mean(0)
