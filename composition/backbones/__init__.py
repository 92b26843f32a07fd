"""The model families. `open` turns a name, a folder, a file or a hub id into a Backbone."""

from composition.backbones.base import Backbone


def open(source: str, *, device: str | None = None, dtype: str | None = None, offload: str = "auto") -> Backbone:
    """Find, load and place a model; composition.backbones.opening and .placement say what may be refused."""
    from composition.backbones import opening, placement
    from composition.backbones.unet import UNetBackbone

    where = opening.find(source)
    family = opening.family(where)
    plan = placement.choose(device, dtype, offload, family=family)
    pipeline = opening.load(where, plan.dtype)
    return UNetBackbone(pipeline, family, placement.place(pipeline, plan))
