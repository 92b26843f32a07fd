"""Conditions without banks: ControlNets on Stable Diffusion and SDXL, as `conditions` are on FLUX.

A ControlNet has no state: it is evaluated with the UNet, in every row (`hooks.controlnet`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from composition.adapters import Adapters
from composition.backbones.loading import controlnet as loading
from composition.conditions import Call
from composition.hooks.controlnet import Control, controlled, hint
from composition.loop import Conditioning, Step
from composition.loras import controls
from composition.refusal import Refused
from composition.request import Condition, Receipt


@dataclass(frozen=True, eq=False)
class Net:
    """A ControlNet that was opened, and what it is."""

    net: Any
    receipt: Receipt


class ControlNets:
    """The conditions of one request that ControlNets read. They see no LoRAs, so a method may vary these as it likes."""

    isolated = False

    def __init__(self, backbone: Any, conditions: Mapping[str, Condition], controls: Mapping[str, Control], receipts: Mapping[str, Receipt]) -> None:
        self.backbone, self.receipts = backbone, dict(receipts)
        self._conditions, self._controls = dict(conditions), dict(controls)

    @property
    def notes(self) -> dict[str, Any]:
        return {"conditions": dict.fromkeys(self._conditions, "ControlNet")}

    def live(self, step: Step) -> tuple[str, ...]:
        """The names of those that act at this step."""
        return tuple(name for name, condition in self._conditions.items() if condition.on(step.index, step.count))

    def fill(
        self, cond: Callable[[], Conditioning], adapters: Adapters, use: Mapping[str, float], before: Callable[[], None],
    ) -> None:
        """Nothing is computed ahead."""

    @contextmanager
    def acting(self, call: Call) -> Iterator[None]:
        """While it lasts, the denoiser has the residuals of those that act at this step."""
        with controlled(self.backbone.denoiser, [self._controls[name] for name in self.live(call.step)], segments=call.segments):
            yield


def read(
    backbone: Any, conditions: Mapping[str, Condition], nets: Mapping[str, Net], drawn: Mapping[str, Image.Image], size: tuple[int, int],
) -> ControlNets:
    """Every condition with its ControlNet and picture, for pictures of this (width, height). drawn: the pictures, annotated.

    Raises Refused for a condition that says what is a condition LoRA's alone.
    """
    for name, condition in conditions.items():
        if condition.weight != 1.0:
            raise Refused(f"condition {name!r} has weight {condition.weight:g}, which is a condition LoRA's; a ControlNet has a strength")
        if condition.kind == "subject":
            raise Refused(f"condition {name!r} is to show a subject; a ControlNet reads a picture that lies over the whole one")
    given = {name: Control(nets[name].net, hint(drawn[name], size), condition.strength) for name, condition in conditions.items()}
    return ControlNets(backbone, conditions, given, {name: nets[name].receipt for name in conditions})


def open(path: Path, backbone: Any) -> Net:
    """A ControlNet and its receipt. Raises Refused as `backbones.loading.controlnet`."""
    return Net(loading.open(path, backbone), controls.receipt(path, backbone.family))
