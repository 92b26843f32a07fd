"""Which of PyTorch's kernels computes attention: never cuDNN's where gradients are taken.

In FLUX's backward pass in bfloat16 on an H200, cuDNN's kernel, PyTorch's first choice there, gave NaN
(`ScaledDotProductCudnnAttentionBackward0`); flash, memory-efficient and plain products agreed with each other.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

FEW = 1024  # positions up to which all their products fit in memory at ease


@contextmanager
def attention_for(device: torch.device, *, positions: int | None = None, gradients: bool = False) -> Iterator[None]:
    """Context: attention by the fastest kernels that are right here; what was allowed before is allowed again afterwards.

    positions: of the longest sequence, where it is known. On a processor, attention over few of them is several times faster as plain
    products. gradients: they are taken of what is computed inside; a backward pass that computes activations again belongs inside, too.
    """
    with ExitStack() as stack:
        if device.type == "cpu" and positions is not None and positions <= FEW:
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if gradients:
            stack.enter_context(_without_cudnn())
        yield


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = cuda.cudnn_sdp_enabled()
    try:
        cuda.enable_cudnn_sdp(False)
        yield
    finally:
        cuda.enable_cudnn_sdp(before)
