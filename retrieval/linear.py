"""The weight encoder that `ridge.fit` makes, with its file: what a LoRA changes in each layer, mapped into the space of a judge's texts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from composition import atomic, untrusted
from composition.loras.safetensors import load_safely
from composition.refusal import Refused
from retrieval import sketch as sketches
from retrieval.ridge import Fit, Lora, Reading, opened, read, shapes
from retrieval.sketch import Sketch

SETTINGS, WEIGHTS = "linear.json", "linear.safetensors"


@dataclass(frozen=True)
class LinearSettings:
    """layers: by name, with the (out, in) of its update as a matrix. base: the model whose LoRAs it was trained on; family: its kind. judge: whose
    texts. reads: exact factors, or sketches of this side. loras: how many it learned from."""

    layers: Mapping[str, tuple[int, int]]
    base: str
    family: str
    judge: str
    loras: int
    reads: Literal["factors", "sketches"] = "factors"
    side: int = sketches.SIDE
    sketch_version: int = sketches.VERSION


class LinearEncoder:
    """Open it with `LinearEncoder.open`, make it of what `ridge.fit` learned.

    name: the base and the first letters of the weights' hash; vectors of encoders of different names cannot be compared.
    """

    def __init__(self, settings: LinearSettings, readings: Mapping[str, Reading], maps: Mapping[str, Float[Tensor, "ab q"]], axes: Float[Tensor, "q D"],
                 centre: Float[Tensor, " T"], name: str = "") -> None:  # fmt: skip
        self.settings, self.readings, self.maps, self.axes, self.centre, self.name = settings, readings, maps, axes, centre, name

    @classmethod
    def of(cls, fit: Fit, settings: LinearSettings, centre: Float[Tensor, " T"]) -> "LinearEncoder":
        """centre: that `fit` had. Layers' weights are taken into the maps."""
        maps = {layer: (fit.maps[layer] * fit.weights[layer] ** 0.5).float() for layer in settings.layers}
        size = torch.stack([part.square().sum() for part in maps.values()]).sum().sqrt().clamp_min(1e-30)
        return cls(settings, fit.readings, {layer: part / size for layer, part in maps.items()}, fit.axes.float(), centre.float())

    @classmethod
    def open(cls, folder: Path | str) -> "LinearEncoder":
        """The encoder that `save` wrote into a folder. Raises Refused, in plain words, for anything else."""
        folder = Path(folder)
        settings = _settings(folder / SETTINGS)
        file = load_safely(folder / WEIGHTS)
        weights = {name: value.float() for name, value in file.tensors.items()}
        try:
            axes, centre = weights.pop("axes"), weights.pop("centre")
            readings, maps = {}, {}
            for number, (layer, (rows, columns)) in enumerate(settings.layers.items()):
                outputs, inputs = weights.pop(f"outputs.{number}", None), weights.pop(f"inputs.{number}", None)
                width = settings.side**2
                if settings.reads == "factors":
                    if outputs is None or inputs is None or outputs.shape[0] != rows or inputs.shape[0] != columns:
                        raise ValueError(f"no bases for {layer}")
                    width = outputs.shape[1] * inputs.shape[1]
                readings[layer], maps[layer] = Reading(outputs, inputs), weights.pop(f"map.{number}")
                if maps[layer].shape != (width, axes.shape[0]):
                    raise ValueError(f"the map of {layer} has another shape")
            if weights or axes.ndim != 2 or centre.ndim != 1 or axes.shape[1] != centre.shape[0]:
                raise ValueError("parts too many or of other shapes")
        except (KeyError, ValueError, IndexError) as error:
            raise Refused(f"{folder}: {WEIGHTS} and {SETTINGS} do not belong together ({' '.join(str(error).split())[:200]})") from None
        return cls(settings, readings, maps, axes, centre, f"{settings.base} {file.tensor_sha256[:12]}")

    def save(self, folder: Path) -> None:
        """Write the weights in half precision and the settings, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"axes": self.axes, "centre": self.centre}
        for number, layer in enumerate(self.settings.layers):
            tensors[f"map.{number}"] = self.maps[layer] * 2.0**8  # of a size that half precision holds; lengths are of no account
            parts = {"outputs": self.readings[layer].outputs, "inputs": self.readings[layer].inputs}
            tensors |= {f"{name}.{number}": part for name, part in parts.items() if part is not None}
        atomic.write(folder / WEIGHTS, save({name: value.half().contiguous() for name, value in tensors.items()}))
        atomic.write(folder / SETTINGS, json.dumps(asdict(self.settings), indent=1) + "\n")

    def read(self, texts: Float[Tensor, "t T"]) -> Float[Tensor, "t D"]:
        """The judge's text vectors as vectors of length 1 in the space of the LoRAs: what they say beyond what all texts say."""
        return F.normalize(F.normalize(texts.float(), dim=-1) - self.centre, dim=-1)

    def encode(self, loras: Sequence[Lora]) -> Float[Tensor, "n D"]:
        """LoRAs as vectors of length 1: what `sketch.named` gives, or sketches, as `reads` says. Raises Refused for one without a known layer."""
        rows = []
        for lora in loras:
            parts = opened(lora.shrunk(self.settings.side) if isinstance(lora, Sketch) else lora)
            parts = {layer: parts[layer] for layer, shape in shapes(lora).items() if shape == self.settings.layers.get(layer)}
            coordinates = torch.zeros(len(self.axes), dtype=torch.float64)
            for layer, reading in self.readings.items():
                if (entries := read(parts.get(layer), reading)) is not None:
                    coordinates += entries @ self.maps[layer].double()
            if not coordinates.any():
                raise Refused(f"a LoRA changes no layer that this encoder knows: it is for {self.settings.base}")
            rows.append(F.normalize(coordinates @ self.axes.double(), dim=-1).float())
        return torch.stack(rows) if rows else torch.zeros(0, self.axes.shape[1])

    def knows(self, lora: Lora) -> bool:
        """Whether a LoRA changes any layer that the encoder reads, in the shape that it has there."""
        fitting = [layer for layer, shape in shapes(lora).items() if self.settings.layers.get(layer) == shape]
        if isinstance(lora, Sketch):
            return lora.side >= self.settings.side and bool(fitting)
        return any(bool(lora[layer].up.any() and lora[layer].down.any()) for layer in fitting)


def _settings(file: Path) -> LinearSettings:
    """Those in a file of `save`. Raises Refused."""
    try:
        words = untrusted.parse_file(file)
        if not isinstance(words, dict) or set(words) != {field.name for field in fields(LinearSettings)}:
            raise ValueError("does not have the settings of an encoder")
        sizes = words.pop("layers")
        if not isinstance(sizes, dict) or not sizes or not all(
                isinstance(shape, list) and len(shape) == 2 and all(type(x) is int and x > 0 for x in shape) for shape in sizes.values()):
            raise ValueError("has layers without shapes")
        if not all(isinstance(words[name], str) for name in ("base", "family", "judge")) or words["reads"] not in ("sketches", "factors"):
            raise ValueError("does not say what it was trained on")
        if type(words["side"]) is not int or not 1 <= words["side"] <= sketches.SIDE or type(words["loras"]) is not int:
            raise ValueError(f"has no side from 1 to {sketches.SIDE}")
        settings = LinearSettings({name: (shape[0], shape[1]) for name, shape in sizes.items()}, **words)
    except untrusted.Unreadable as error:
        raise Refused(f"{file} {error}") from None
    except (ValueError, TypeError) as error:
        raise Refused(f"{file} {error}") from None
    if settings.reads == "sketches" and settings.sketch_version != sketches.VERSION:
        raise Refused(f"{file.parent} reads sketches of version {settings.sketch_version}; this Medley makes version {sketches.VERSION}: train it anew")
    return settings
