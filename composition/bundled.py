"""What ships with Medley, inside the package `assets`: bundled models with their LoRAs, frequency profiles and testbeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Bundle:
    """Where the parts of one bundled model lie, relative to the package `assets`."""

    model: str
    loras: str
    testbed: str
    profiles: str
    conditions: str = ""  # condition LoRAs or ControlNets, "" where there are none
    gates: str = ""  # AutoLoRA's, "" where there are none


BUNDLES: Mapping[str, Bundle] = {
    "pocket": Bundle("pocket128/sd", "pocket128/loras", "pocket128/testbed.json", "pocket128/profiles", conditions="pocket128",
                     gates="pocket128/gates.safetensors"),
    "pocket-flux": Bundle("pocket/flux", "pocket/flux-loras", "pocket/testbed-flux.json", "pocket/profiles",
                          conditions="pocket/flux-conditions", gates="pocket/gates.safetensors"),
}


def path(relative: str) -> Path:
    """A file or folder of the package `assets`; it is not there when Medley was installed without its assets."""
    try:
        return Path(str(files("assets"))) / relative
    except ModuleNotFoundError:
        return Path("assets") / relative
