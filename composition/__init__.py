"""Medley's engine: several LoRAs in one picture.

    from composition import Engine, Lora, Request
    engine = Engine.open("pocket")
    result = engine.run(Request(prompt="a raccoon in the snow", loras=[Lora("raccoon")]))
"""

import importlib
from typing import TYPE_CHECKING

from composition.refusal import Cancelled, Refused
from composition.request import Condition, Embedding, Hires, Lora, Picture, Receipt, Request, Result
from composition.version import __version__

if TYPE_CHECKING:
    from composition import methods
    from composition.engine import Engine, Event

__all__ = ["Cancelled", "Condition", "Embedding", "Engine", "Event", "Hires", "Lora", "Picture", "Receipt", "Refused", "Request", "Result", "__version__",
           "methods", "samplers"]


def samplers() -> list[str]:
    """The names `Request.sampler` knows."""
    from composition.sampler_names import TITLES

    return list(TITLES)


def __getattr__(name: str) -> object:
    """Engine and Event are loaded when first asked for: requests alone need neither torch nor diffusers."""
    if name in ("Engine", "Event"):
        return getattr(importlib.import_module("composition.engine"), name)
    if name == "methods":
        return importlib.import_module("composition.methods")
    raise AttributeError(f"module 'composition' has no attribute {name!r}")
