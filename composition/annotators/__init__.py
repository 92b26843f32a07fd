"""What makes the picture of a condition (its edges, its greys, its blur) from a photo: one function per annotator, by name.

What belongs here: pictures from pictures. What does not: opening files (composition.pictures) and what a denoiser does with the result
(composition.conditions). May import composition.pictures and composition.refusal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from PIL import Image

from composition import pictures
from composition.annotators import lines, plugins, tones
from composition.refusal import Refused


@dataclass(frozen=True)
class Annotator:
    """about: what it draws, in a few words. make: from a picture (mode "RGB") to one of the same size and mode; raises Refused.

    transparent: it reads what is transparent, so that its picture may be "RGBA". extra: what must be installed and fetched for it, ""
    for one that runs as it is. licence: of the code and the weights that it needs besides.
    """

    about: str
    make: Callable[[Image.Image], Image.Image]
    transparent: bool = False
    extra: str = ""
    licence: str = ""


ANNOTATORS: Mapping[str, Annotator] = {
    "canny": Annotator("edges as thin white lines on black", lines.canny),
    "scribble": Annotator("outlines as soft thick white lines on black", lines.scribble),
    "grey": Annotator("the picture without its colours", tones.grey),
    "blur": Annotator("the picture out of focus: colours and large forms", tones.blur),
    "tile": Annotator("the picture at an eighth of its size, enlarged again", tones.tile),
    "layout": Annotator("a few flat regions of colour", tones.layout),
    "hole": Annotator("the picture with black where it is transparent", tones.hole, transparent=True),
} | {name: Annotator(plugin.about, plugin.make, extra=plugin.extra, licence=plugin.licence) for name, plugin in plugins.PLUGINS.items()}


def find(name: str) -> Annotator:
    """The annotator of this name. Raises Refused with the nearest names."""
    if name in ANNOTATORS:
        return ANNOTATORS[name]
    near = get_close_matches(name, ANNOTATORS, 2, 0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(ANNOTATORS)}"
    raise Refused(f"no annotator is named {name!r:.200}; {hint}")


def annotate(name: str, picture: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """What the annotator of this name makes of a picture from `pictures.condition`: the same size, mode "RGB".

    name "": the picture is drawn for its condition already, and only what is transparent gets a ground. size: (width, height) of the
    picture that it is to control; a larger one is made smaller first, until it just covers that: lines of one pixel would fade. Raises
    Refused for an unknown name, and for a picture in which that annotator finds nothing.
    """
    if not name:
        return pictures.opaque(picture)
    annotator = find(name)
    picture = pictures.covering(picture, size) if size else picture
    return annotator.make(picture if annotator.transparent else pictures.opaque(picture))
