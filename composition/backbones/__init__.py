"""The model families. `open` turns a name, a folder, a file or a hub id into a Backbone."""

from composition.backbones.base import Backbone


def open(source: str, *, device: str | None = None, dtype: str | None = None, offload: str = "auto") -> Backbone:
    """Find, load and place a model; see composition.backbones.opening and .placement for what may be refused."""
    from composition.backbones import opening, placement
    from composition.backbones.unet import UNetBackbone

    plan = placement.choose(device, dtype, offload)
    pipeline = opening.load(opening.find(source), plan.dtype)
    family = opening.family(pipeline)
    placement.place(pipeline, plan)
    return UNetBackbone(pipeline, family)
