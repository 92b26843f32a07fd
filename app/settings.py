"""Where a user's own things live: MEDLEY_HOME, or the platform's folder for application data."""

import os
from pathlib import Path

from platformdirs import user_data_path


def home() -> Path:
    """The folder of this user's data. It may not exist yet."""
    chosen = os.environ.get("MEDLEY_HOME")
    return Path(chosen).expanduser() if chosen else user_data_path("medley", appauthor=False)


def lora_folder() -> Path:
    """Where the user puts LoRA files that should be found by name. It may not exist yet."""
    return home() / "loras"
