"""A folder of pictures for a condition LoRA: each with the picture of its condition, from an annotator or from a second folder.

Pictures are seen at several sizes and in slightly different parts, and annotated at the size they are seen at, as a user's picture is.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from composition import annotators, conditions
from composition.backbones import vae
from composition.loras.condition import Settings
from composition.refusal import Refused
from composition.training import captions
from composition.training.pairs import Bucket, Pairs
from composition.training.pictures import SHIFT, listed, opened

LONGEST = 2.0  # of the longer side over the shorter one that a picture is trained at
ALIKE = 0.03  # by which two pictures of a pair may differ in shape
Size = tuple[int, int]  # width, height


@dataclass(frozen=True, eq=False)
class PairFolder:
    """Pictures and what their conditions are made from, each of which could be read; captions by picture number, "" for none.

    drawn: the condition pictures, in the same order; () where `annotator` makes them. origin: a digest of all contents.
    """

    files: tuple[Path, ...]
    drawn: tuple[Path, ...]
    annotator: str
    captions: Mapping[int, str]
    origin: str

    def __len__(self) -> int:
        return len(self.files)


def read(images: Path, annotator: str, drawn: Path | None, kind: str) -> PairFolder:
    """Look at every picture and caption. Raises Refused, naming the file, for what cannot be learned from.

    annotator: what makes the conditions, "" when `drawn`, a second folder, has them: a picture of the same name for each.
    """
    if (drawn is None) == (not annotator):
        raise Refused("say where the condition pictures come from: --annotator NAME, or --conditions DIR with a picture of the same name for each")
    if kind == "subject" and drawn is None:
        raise Refused("a subject needs pictures of it by itself: --conditions DIR; made from the picture itself, it would be learned as a copy")
    files = listed(images)
    others = {path.stem: path for path in listed(drawn)} if drawn is not None else {}
    texts = captions.beside(images, files)
    digest = hashlib.sha256(repr((annotator, kind)).encode())
    for file in files:
        picture = opened(file)
        digest.update(repr((file.name, texts.get(file.name))).encode() + hashlib.sha256(file.read_bytes()).digest())
        if drawn is None:
            _checked(annotator, picture, file)
            continue
        if file.stem not in others:
            raise Refused(f"{file} has no condition picture: add {drawn / (file.stem + '.png')}")
        other = opened(others[file.stem])
        digest.update(hashlib.sha256(others[file.stem].read_bytes()).digest())
        shapes = [shown.width / shown.height for shown in (picture, other)]
        if kind == "spatial" and abs(shapes[0] / shapes[1] - 1) > ALIKE:
            raise Refused(f"{others[file.stem]} is {other.width}x{other.height} and {file.name} {picture.width}x{picture.height}: "
                          "a condition lies over its picture, so both need one shape")
    return PairFolder(tuple(files), tuple(others[file.stem] for file in files) if drawn else (), annotator,
                      {i: texts.get(file.name, "") for i, file in enumerate(files)}, digest.hexdigest())


def _checked(annotator: str, picture: Image.Image, file: Path) -> None:
    try:
        annotators.annotate(annotator, picture)
    except Refused as error:
        raise Refused(f"{file}: {error}") from None


def fitting(picture: Size, side: int, unit: int) -> Size:
    """The size nearest to the picture's shape (none longer than LONGEST) that has about side * side pixels, in whole tokens."""
    ratio = min(max(picture[0] / picture[1], 1 / LONGEST), LONGEST)
    wide, high = side * ratio**0.5, side / ratio**0.5
    return max(unit, round(wide / unit) * unit), max(unit, round(high / unit) * unit)


def pairs(
    backbone: Any, folder: PairFolder, name: str, settings: Settings, *, sides: Sequence[int], count: int, flip: bool, seed: str,
    words: Mapping[str, str],
) -> Pairs:
    """`count` views of the folder's pictures with their conditions, encoded; every picture about equally often, at sizes drawn from `sides`.

    Everything is drawn from (seed, number of the view). The first view of each picture is not mirrored.
    """
    unit = backbone.pixels_per_token
    views: dict[Size, list[tuple[Tensor, Tensor, str]]] = {}
    for which, file in enumerate(folder.files):
        picture = conditions.flattened(opened(file), settings.colour)
        other = opened(folder.drawn[which]) if folder.drawn else None
        for number in range(which, max(count, len(folder)), len(folder)):
            rng = random.Random(f"{seed}/{number}")
            size = fitting(picture.size, rng.choice(list(sides)), unit)
            mirrored = flip and number != which and rng.random() < 0.5
            seen, condition = _view(picture, other, size, folder.annotator, settings, rng, mirrored)
            views.setdefault(size, []).append((_tensor(seen), conditions.pixels(condition, settings, unit), folder.captions[which]))
    buckets = [_encoded(backbone, rows) for _, rows in sorted(views.items())]
    blank = conditions.pixels(Image.new("RGB", (settings.size, settings.size), settings.colour), settings, unit)
    origin = f"{settings} {tuple(sides)} {count} {flip} {folder.origin}"
    return Pairs(name, settings, buckets, vae.encode(backbone.pipeline, blank)[0].cpu(), words, origin)


def _view(
    picture: Image.Image, other: Image.Image | None, size: Size, annotator: str, settings: Settings, rng: random.Random, mirrored: bool,
) -> tuple[Image.Image, Image.Image]:
    """A part of the picture at this size, and its condition."""
    scale = min(picture.width / size[0], picture.height / size[1]) * (1 - SHIFT * rng.random())
    wide, high = scale * size[0], scale * size[1]
    left, top = rng.uniform(0, picture.width - wide), rng.uniform(0, picture.height - high)
    box = (left, top, left + wide, top + high)
    seen = picture.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    if other is None:
        condition = _annotated(annotator, seen, settings)
    elif settings.kind == "subject":
        condition = other
    else:
        across, down = other.width / picture.width, other.height / picture.height
        part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        condition = conditions.flattened(other, settings.colour).resize(size, Image.Resampling.BILINEAR, part)
    return (ImageOps.mirror(seen), ImageOps.mirror(condition)) if mirrored else (seen, condition)


def _annotated(annotator: str, seen: Image.Image, settings: Settings) -> Image.Image:
    try:
        return annotators.annotate(annotator, seen)
    except Refused:  # nothing in this part of it, though there is in the whole
        return Image.new("RGB", seen.size, settings.colour)


def _tensor(picture: Image.Image) -> Float[Tensor, "1 3 height width"]:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(torch.get_default_dtype()) / 127.5 - 1


def _encoded(backbone: Any, rows: Sequence[tuple[Tensor, Tensor, str]]) -> Bucket:
    seen, read, prompts = zip(*rows, strict=True)
    latents, drawn = (vae.encode(backbone.pipeline, torch.cat(parts), part=8).cpu() for parts in (seen, read))
    return Bucket(latents, drawn, prompts)
