"""LoRAs of a lower rank than they were trained at: of each layer's update the nearest of that rank (Eckart and Young), so that more fit into a package."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .previews import describe

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def shorten(file: Path, rank: int) -> float:
    """Rewrite a LoRA in the diffusers layout, alpha as its rank, at this rank; its header stays. Returns the share of the updates' energy that is kept.

    A layer of no higher rank, as of a file that was shortened before, stays as it is.
    """
    tensors, kept, whole = load_file(file), 0.0, 0.0
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    for name in [name for name in tensors if name.endswith(DOWN) and len(tensors[name]) > rank]:
        down, up = tensors[name], tensors[name.replace(DOWN, UP)]
        across, inner = torch.linalg.qr(down.flatten(1).double().T)
        along, outer = torch.linalg.qr(up.flatten(1).double())
        left, strengths, right = torch.linalg.svd(outer @ inner.T)
        root = strengths[:rank].sqrt()
        tensors[name] = (root[:, None] * (right[:rank] @ across.T)).reshape(rank, *down.shape[1:]).to(down.dtype).contiguous()
        tensors[name.replace(DOWN, UP)] = ((along @ left[:, :rank]) * root).reshape(len(up), rank, *up.shape[2:]).to(up.dtype).contiguous()
        kept, whole = kept + float(strengths[:rank].square().sum()), whole + float(strengths.square().sum())
    save_file(tensors, file, metadata=header)
    describe(file, {})  # the header's words in order
    return kept / whole if whole else 1.0
