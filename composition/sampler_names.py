"""The samplers' names: ours, and the titles by which A1111 and its kin write them into pictures.

A table that imports nothing: requests, records and schedulers all read it.
"""

from collections.abc import Mapping

DEFAULT = "default"  # the sampler that the model was saved with
FLOW = "Euler Simple"  # the sampler of models that follow a flow (FLUX, SD 3): "Euler" with "Schedule type: Simple" in Forge

# Titles as the A1111 web UI writes them; a schedule is the last word ("Karras").
TITLES: Mapping[str, str] = {
    DEFAULT: "",
    "euler": "Euler",
    "euler-karras": "Euler Karras",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2-a": "DPM2 a",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "dpm++2m-sde-karras": "DPM++ 2M SDE Karras",
    "ddim": "DDIM",
    "unipc": "UniPC",
    "deis": "DEIS",
    "pndm": "PLMS",
    "lcm": "LCM",
}
BY_TITLE: Mapping[str, str] = {title.lower(): name for name, title in TITLES.items() if title}


def canonical(text: str) -> str:
    """Our name for a name or a title, in any case; what is neither comes back as it is."""
    plain = " ".join(text.split()).lower()
    if plain in TITLES:
        return plain
    return BY_TITLE.get(plain, text)
