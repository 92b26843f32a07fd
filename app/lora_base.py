"""What LoRAs are for: a base by its name, and its layers without their weights, which say whether a LoRA fits it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from composition import Refused, bundled
from composition.backbones.loading import open as loading
from composition.backbones.loading import skeleton
from composition.bundled import BUNDLES
from composition.loras import reader
from retrieval.sketch import Sketch, named, sketch

if TYPE_CHECKING:
    from composition.loras.kinds.lora import Factors
    from composition.loras.safetensors import SafeFile


@dataclass(frozen=True)
class Base:
    """name: of a bundled model, else the family's. components: its modules without weights, {} where they are not known."""

    name: str
    model: str
    family: str
    components: Mapping[str, nn.Module]

    @staticmethod
    def of(model: str) -> "Base":
        """Of a model by name, folder or hub id, without its weights. Raises Refused as the engine does for one that cannot be opened."""
        family = loading.family(loading.find(model))
        if model in BUNDLES:
            return Base(model, model, family, skeleton.of_folder(bundled.path(BUNDLES[model].model)))
        return Base(family, model, family, skeleton.of_family(family) if family in skeleton.PUBLIC else {})

    @property
    def layers(self) -> int:
        """How many layers a LoRA may change."""
        return sum(isinstance(module, nn.Linear | nn.Conv2d) for component in self.components.values() for module in component.modules())

    def factors(self, path: Path) -> "Mapping[str, Factors] | None":
        """What a file changes, layer by layer under the names of sketches; None as `sketched`."""
        if not self.components:
            return None
        try:
            return named(reader.read(path, self.components, self.family, allow_partial=True).factors) or None
        except (Refused, OSError):
            return None

    def sketched(self, path: Path, raw: "SafeFile | None" = None) -> Sketch | None:
        """The sketch of a file that is for this base; None for another one's, or where the base's layers are not known."""
        if not self.components:
            return None
        try:
            read = sketch(path, self.components, self.family, raw=raw)
        except (Refused, OSError):
            return None
        return read if read.layers else None
