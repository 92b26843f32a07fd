"""Toy engines of each family, with three LoRA files each, made once for the session."""

import pytest
import torch

from tests import toys

FAMILIES = {"sd": toys.sd, "sdxl": toys.sdxl, "sd3": toys.sd3, "flux": toys.flux, "flux-dev": toys.flux_distilled}


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory):
    """Family -> three LoRA files: diffusers layout; alpha half the rank, in kohya's layout for UNets; diffusers with rank 3.

    (Stock diffusers reads kohya's layout for FLUX at FLUX's own widths only, and for SD3 not at all.)
    """
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for family, make in FAMILIES.items():
        pipe = make(dtype=torch.float64)
        found[family] = [
            toys.lora(pipe, folder / f"{family}-one.safetensors", seed=1),
            toys.lora(pipe, folder / f"{family}-two.safetensors", seed=2, layout="kohya" if hasattr(pipe, "unet") else "diffusers",
                      alpha=2.0),
            toys.lora(pipe, folder / f"{family}-three.safetensors", seed=3, rank=3, targets=("attn", "conv")),
        ]
    return found


@pytest.fixture(scope="session")
def engines():
    """Family -> an engine on a toy in float64."""
    from composition import Engine, backbones

    return {family: Engine(backbones.of(make(dtype=torch.float64), family.removesuffix("-dev")), "toy") for family, make in FAMILIES.items()}


SHAPED = ("sd", "flux")  # one UNet and one transformer: where the tests of a method check shapes
