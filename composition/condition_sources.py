"""What conditions are read with, by name: condition LoRAs and control LoRAs on FLUX, ControlNets on Stable Diffusion and SDXL; found, listed,
opened, kept."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from composition import annotators, conditions, control_loras, controlnets, pictures
from composition.backbones.base import Backbone, ReadsConditions
from composition.conditions import Acting, Conditions, Shelf
from composition.controlnets import Net
from composition.loras import condition, control_lora, controls, library
from composition.loras.condition import ConditionLora, Settings
from composition.loras.control_lora import ControlLora
from composition.refusal import Refused
from composition.request import Condition, Receipt, Request


class Control(NamedTuple):
    """What a condition can be read with. kind: "spatial" or "subject". annotator: what makes its pictures, "" where its file does not say.
    bundled: with the model."""

    path: Path
    name: str
    kind: str
    annotator: str
    sort: Literal["condition LoRA", "control LoRA", "ControlNet"]
    bundled: bool


def named(model: str, folders: Sequence[Path]) -> list[Control]:
    """All that can be named beside this model, of whatever family: its bundled ones, then those in the folders. Nothing is opened."""
    return _loras(model, folders) + _nets(model, folders)


def described(source: str, model: str, folders: Sequence[Path]) -> tuple[Control, Receipt] | None:
    """What the condition LoRA, control LoRA or ControlNet of this name or path says of itself; None where there is none."""
    own = library.condition_places(model)
    for find in (lambda: library.find(source, model, folders, conditions=True), lambda: controls.find(source, [*own, *folders])):
        with suppress(Refused):
            path = find()
            kind, bundled = controls.recognise(path).kind, any(path.is_relative_to(place) for place in own)
            if kind == "controlnet":
                return _net(path, own), controls.receipt(path)
            if kind == "control-lora":
                return _lora(path, None, bundled), controls.receipt(path, "flux", "control-lora")
            settings, receipt = condition.describe(path)
            return _lora(path, settings, bundled), receipt
    return None


def _loras(model: str, folders: Sequence[Path]) -> list[Control]:
    return [_lora(path, settings, owned) for path, settings, owned in library.condition_loras(model, folders)]


def _lora(path: Path, settings: Settings | None, bundled: bool) -> Control:
    """A condition LoRA with its settings, or a control LoRA, which has none."""
    if settings is None:
        return Control(path, path.stem, "spatial", controls.annotator(path), "control LoRA", bundled)
    return Control(path, path.stem, settings.kind, settings.annotator, "condition LoRA", bundled)


def _nets(model: str, folders: Sequence[Path]) -> list[Control]:
    own = library.condition_places(model)
    return [_net(path, own) for path in controls.nets([*own, *folders])]


def _net(path: Path, own: Sequence[Path]) -> Control:
    return Control(path, controls.name_of(path), "spatial", controls.annotator(path), "ControlNet", any(path.is_relative_to(place) for place in own))


class ConditionSources:
    """Those of one model. What the last request was read with is kept for the next.

    folders: where they are looked up besides the bundled ones.
    """

    def __init__(self, backbone: Backbone, model: str, folders: Sequence[Path]) -> None:
        self.backbone, self.model, self.folders = backbone, model, tuple(folders)
        self._nets = backbone.family in ("sd", "sdxl")  # read by ControlNets
        self._held: dict[Any, ConditionLora | ControlLora | Net] = {}  # by path and state on disk

    def check(self, request: Request) -> None:
        """Raises Refused for conditions of a model that cannot read any."""
        if request.conditions and not (self._nets or isinstance(self.backbone, ReadsConditions)):
            raise Refused(f"this request has conditions, which {self.model} cannot read: ControlNets need Stable Diffusion or SDXL, condition "
                          "LoRAs FLUX")

    def find(self, source: str) -> Path:
        """The file or folder of this name or path. Raises Refused with the nearest names."""
        if self._nets:
            return controls.find(source, [*library.condition_places(self.model), *self.folders])
        return library.find(source, self.model, self.folders, conditions=True)

    def listed(self) -> list[Control]:
        """All that can be named, those bundled with the model first."""
        if self._nets:
            return _nets(self.model, self.folders)
        return _loras(self.model, self.folders) if isinstance(self.backbone, ReadsConditions) else []

    def annotator(self, control: Condition) -> str | None:
        """What makes the condition of its picture: the request's choice, else its file's; None where no model reads it."""
        if control.annotator is not None or not (self._nets or isinstance(self.backbone, ReadsConditions)):
            return control.annotator
        path = self.find(control.source)
        return controls.annotator(path) if self._nets else condition.describe(path)[0].annotator

    def opened(self, request: Request, paths: Mapping[str, Path], size: tuple[int, int], *, isolated: bool, shelf: Shelf) -> Acting | None:
        """The settled request's conditions, their files read and their pictures annotated; None without any. paths: by name.

        size: (width, height) of the picture. isolated, shelf: as of `Conditions`. Raises Refused for a file or a picture that cannot be used.
        """
        stamps = {name: (controls.stamp(path) if self._nets else (path, *library.stamp(path))) for name, path in paths.items()}
        held, self._held = self._held, {}
        for name, stamp in stamps.items():
            if stamp not in self._held:
                self._held[stamp] = held.get(stamp) or self._read(paths[name])
        if not paths:
            return None
        drawn = {name: self._drawn(name, control, size) for name, control in request.controls.items()}
        files: Any = {name: self._held[stamp] for name, stamp in stamps.items()}
        if self._nets:
            return controlnets.read(self.backbone, request.controls, files, drawn, size)
        banked = {name: control for name, control in request.controls.items() if isinstance(files[name], ConditionLora)}
        reads = conditions.read(self.backbone, banked, files, drawn, size)
        banks = Conditions(self.backbone, reads, isolated=isolated, shelf=shelf) if banked else None
        rest = [name for name in request.controls if name not in banked]
        if len(rest) > 1:
            raise Refused(f"conditions {' and '.join(map(repr, rest))} are read by control LoRAs, of which FLUX takes one: its input has room for one "
                          "picture")
        if not rest:
            return banks
        return control_loras.read(self.backbone, rest[0], request.controls[rest[0]], files[rest[0]], drawn[rest[0]], size, banks)

    def _read(self, path: Path) -> ConditionLora | ControlLora | Net:
        if self._nets:
            return controlnets.open(path, self.backbone)
        kind = controls.usable(path, control_lora.inputs(self.backbone.denoiser))
        if kind == "controlnet":
            raise Refused(f"{path.name} is a ControlNet for Stable Diffusion or SDXL; on FLUX give a condition LoRA or a control LoRA")
        return control_lora.read(path, self.backbone.denoiser) if kind else condition.read(path, self.backbone.denoiser)

    def _drawn(self, name: str, control: Condition, size: tuple[int, int]) -> Image.Image:
        """The picture that a condition is read from. Without an annotator a condition LoRA's own ground shows through what is clear."""
        picture = pictures.condition(control.image, name)
        if not control.annotator and not self._nets:
            return picture
        try:
            return annotators.annotate(control.annotator or "", picture, size)
        except Refused as error:
            raise Refused(f"condition {name}: {error}") from None
