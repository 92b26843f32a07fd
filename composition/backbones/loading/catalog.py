"""Models with a short name."""

from collections.abc import Mapping
from typing import NamedTuple


class Known(NamedTuple):
    """repository: on the hub. licence: its name, for when the hub cannot be asked."""

    repository: str
    licence: str
    about: str


KNOWN: Mapping[str, Known] = {
    "sd15": Known("stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML OpenRAIL-M", "Stable Diffusion 1.5, 512 px"),
    "sdxl": Known("stabilityai/stable-diffusion-xl-base-1.0", "CreativeML OpenRAIL++-M", "SDXL, 1024 px"),
    "sd3": Known("stabilityai/stable-diffusion-3-medium-diffusers", "Stability AI Community", "Stable Diffusion 3 medium, 1024 px"),
    "sd3.5-medium": Known("stabilityai/stable-diffusion-3.5-medium", "Stability AI Community", "Stable Diffusion 3.5 medium, 1024 px"),
    "sd3.5-large": Known("stabilityai/stable-diffusion-3.5-large", "Stability AI Community", "Stable Diffusion 3.5 large, 1024 px"),
    "flux-dev": Known("black-forest-labs/FLUX.1-dev", "FLUX.1 [dev] Non-Commercial", "FLUX.1-dev, 1024 px, 28 steps"),
    "flux-schnell": Known("black-forest-labs/FLUX.1-schnell", "Apache 2.0", "FLUX.1-schnell, 1024 px, 4 steps"),
}


def repository(name: str) -> str:
    """The hub id that a short name stands for; anything else as it is."""
    return KNOWN[name].repository if name in KNOWN else name
