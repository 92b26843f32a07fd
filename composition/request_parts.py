"""Small parts of a request that stand by themselves: textual inversions, a picture to start from, a second pass."""

import re
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

MAX_IMAGE = 16_000_000  # letters of a picture as a data URL
Fit = Literal["crop", "contain", "stretch"]

_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def last_part(source: str) -> str:
    """Of a path or a name, without the ending of a LoRA file."""
    return re.sub(r"(?i)\.safetensors$", "", PurePath(source.replace("\\", "/")).name)


@dataclass(frozen=True, config=_config)
class Embedding:
    """A textual inversion of a request.

    source: a path to a .safetensors file, or a name in one of the LoRA folders. word: what stands for it in the prompts ("": the word that the
    file names, else the file's name), in place of what it means otherwise; `embedding:name` in a prompt is one whose word is that.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    word: Annotated[str, Field(max_length=200)] = ""

    @property
    def name(self) -> str:
        """The last part of the source without its ending."""
        return last_part(self.source)


@dataclass(frozen=True, config=_config)
class Picture:
    """The picture that a request starts from, instead of noise.

    image: the path of a picture, or the picture as a data URL. strength: how much of it is made anew: noise is added to it as of that part of
    the steps, and those steps run; 1 is all of them. mask: a picture, white where the given one is painted anew and black where it is kept, to
    the bit; of another size it is stretched over the picture. soft: how many pixels inside the white the new picture is blended into the
    given one. fit: how a picture of another shape than the request's size is brought to it: "crop" fills it and cuts off what stands out,
    "contain" has the whole picture in it, with its borders drawn out (and, with a mask, painted anew), "stretch" changes its shape.
    """

    image: Annotated[str, Field(min_length=1, max_length=MAX_IMAGE)]
    strength: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 0.6
    mask: Annotated[str, Field(min_length=1, max_length=MAX_IMAGE)] | None = None
    soft: Annotated[int, Field(ge=0, le=64)] = 4
    fit: Fit = "crop"


@dataclass(frozen=True, config=_config)
class Hires:
    """A second pass: the finished picture enlarged and denoised again, by the same LoRAs and method.

    factor: times as wide and high, rounded to what the model takes. strength: as of a Picture. steps: of which that part runs (None: the
    request's). space: what is enlarged, the "pixel"s of the finished picture or its "latent"s, which leaves doubled contours at a low strength.
    """

    factor: Annotated[float, Field(gt=1.0, le=4.0, allow_inf_nan=False)] = 1.5
    strength: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 0.5
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    space: Literal["pixel", "latent"] = "pixel"
