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
    profiles: str = "pocket/profiles"
    conditions: str = ""  # condition LoRAs or ControlNets, "" where there are none


BUNDLES: Mapping[str, Bundle] = {
    "pocket": Bundle(model="pocket/sd", loras="pocket/loras", testbed="pocket/testbed.json", conditions="pocket128"),
    "pocket-flux": Bundle(model="pocket/flux", loras="pocket/flux-loras", testbed="pocket/testbed-flux.json",
                          conditions="pocket/flux-conditions"),
}


def path(relative: str) -> Path:
    """A file or folder of the package `assets`; it is not there when Medley was installed without its assets."""
    try:
        return Path(str(files("assets"))) / relative
    except ModuleNotFoundError:
        return Path("assets") / relative
