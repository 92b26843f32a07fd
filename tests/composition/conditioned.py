"""Condition LoRAs of the FLUX toys, and their pictures: what tests of conditions run on. Imports nothing of composition."""

import torch
from safetensors.torch import save_file

LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}


def factors(width=32, rank=4, seed=0, double=2, single=2, scale=0.2):
    """Released key without its role -> (down, up), random, of a FLUX of this size."""
    rng = torch.Generator().manual_seed(seed)

    def pair():
        down, up = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((rank, width), (width, rank)))
        return down, up * scale

    keys = [f"transformer_blocks.{i}.attn.processor.{role}_loras.0" for i in range(double) for role in LAYERS]
    keys += [f"single_transformer_blocks.{i}.attn.processor.{role}_loras.0" for i in range(single) for role in ("q", "k", "v")]
    return {key: pair() for key in keys}


def write(path, pairs, **settings):
    """A file in the released layout; settings become its header."""
    tensors = {f"{key}.{role}.weight": value.contiguous().clone() for key, pair in pairs.items() for role, value in zip(("down", "up"), pair, strict=True)}
    save_file(tensors, path, metadata={f"condition.{name}": str(value) for name, value in settings.items()} or None)
    return path


def by_layer(pairs, scale=1.0):
    """Path of the layer -> (down, up, scale, of_output)."""
    paths = {}
    for key, (down, up) in pairs.items():
        block, _, role = key.partition(".processor.")
        role = role.partition("_")[0]
        paths[f"{block}.{LAYERS[role]}"] = (down, up, scale, role == "proj")
    return paths
