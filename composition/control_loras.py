"""Conditions that a control LoRA reads on FLUX (`hooks.control_lora`), beside those that are read from banks (`conditions`)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from composition.adapters import Adapters
from composition.backbones import vae
from composition.conditions import Acting, Call
from composition.hooks.control_lora import controlled
from composition.hooks.controlnet import hint
from composition.loop import Conditioning, Step
from composition.loras.control_lora import ControlLora
from composition.refusal import Refused
from composition.request import Condition, Receipt


class WithControlLora:
    """One condition of a control LoRA, and the other conditions of the request, if there are any."""

    def __init__(self, backbone: Any, name: str, condition: Condition, lora: ControlLora, tokens: Float[Tensor, "1 N c"], others: Acting | None) -> None:
        self.backbone, self.name, self.condition, self.lora, self.tokens, self.others = backbone, name, condition, lora, tokens, others
        self.isolated = others is not None and others.isolated

    @property
    def receipts(self) -> dict[str, Receipt]:
        """What each condition is read with, by name."""
        return {self.name: self.lora.receipt, **(self.others.receipts if self.others else {})}

    def live(self, step: Step) -> tuple[str, ...]:
        """The names of those that act at this step."""
        own = (self.name,) if self.condition.on(step.index, step.count) else ()
        return (*own, *(self.others.live(step) if self.others else ()))

    def fill(self, cond: Conditioning, adapters: Adapters, use: Mapping[str, float], before: Callable[[], None]) -> None:
        """The banks of the others, which do not see the control LoRA."""
        if self.others:
            self.others.fill(cond, adapters, use, before)

    @contextmanager
    def acting(self, call: Call) -> Iterator[None]:
        """While it lasts, the denoiser has those that act at this step."""
        strength = self.condition.strength if self.condition.on(call.step.index, call.step.count) else 0.0
        with controlled(self.backbone.denoiser, self.lora, self.tokens, strength), self.others.acting(call) if self.others else nullcontext():
            yield


def read(
    backbone: Any, name: str, condition: Condition, lora: ControlLora, drawn: Image.Image, size: tuple[int, int], others: Acting | None,
) -> WithControlLora:
    """The condition with its picture encoded, for pictures of this (width, height). drawn: the picture, annotated.

    Raises Refused for a condition that says what is a condition LoRA's alone.
    """
    if condition.weight != 1.0:
        raise Refused(f"condition {name!r} has weight {condition.weight:g}, which is a condition LoRA's; a control LoRA has a strength")
    if condition.kind == "subject":
        raise Refused(f"condition {name!r} is to show a subject; a control LoRA reads a picture that lies over the whole one")
    latents = vae.encode(backbone.pipeline, hint(drawn, size) * 2 - 1)
    return WithControlLora(backbone, name, condition, lora, backbone.tokens(latents.to(backbone.device, backbone.dtype)), others)
