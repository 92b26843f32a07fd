"""A folder of pictures for training: checked when it is read, then seen in many slightly different views.

Five pictures are few. Each is seen as several views (another crop, mirrored, another plain colour behind what is cut
out), drawn from (seed, concept, number of the view) alone.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from composition import pictures as door
from composition.refusal import Refused
from composition.training import captions

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SMALLEST = 16  # pixels of the shorter side
SHIFT = 0.12  # share of a side by which a view may be cropped
WHITE = (255, 255, 255)


@dataclass(frozen=True, eq=False)
class Folder:
    """The pictures of one concept, each of which could be read; captions by picture number, for all or for none.

    origin: a digest of the files' contents, names and captions. said: what was done to the captions, "" for nothing.
    """

    files: tuple[Path, ...]
    captions: Mapping[int, str]
    origin: str
    remark: str = ""

    def __len__(self) -> int:
        return len(self.files)


def listed(path: Path) -> list[Path]:
    """The pictures of a folder in the order of their names. Raises Refused when there is none."""
    if not path.is_dir():
        raise Refused(f"{path} is not a folder: name the folder that the pictures lie in" if path.exists() else
                      f"there is no folder {path}")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    if not files:
        raise Refused(f"there are no pictures in {path} (looked for {', '.join(ENDINGS)}, not in folders inside it)")
    return files


def read(path: Path, trigger: str, category: str) -> Folder:
    """Look at every picture and caption of a folder. Raises Refused, naming the file, for what cannot be learned from."""
    files = listed(path)
    texts = captions.beside(path, files)
    digest = hashlib.sha256(repr((trigger, category)).encode())
    for file in files:
        opened(file)
        digest.update(repr((file.name, texts.get(file.name))).encode() + hashlib.sha256(file.read_bytes()).digest())
    full = {i: captions.with_trigger(texts[f.name], trigger, category) for i, f in enumerate(files)} if texts else {}
    return Folder(tuple(files), full, digest.hexdigest(), captions.added(texts, trigger, category))


def opened(file: Path) -> Image.Image:
    """One picture as RGB or RGBA, upright."""
    upright = door.load(file)
    clear = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
    picture = upright.convert("RGBA" if clear else "RGB")
    if min(picture.size) < SMALLEST:
        raise Refused(f"{file} is only {picture.width}x{picture.height} pixels: give one of at least {SMALLEST} a side")
    return picture


def views(
    folder: Folder, trigger: str, category: str, size: tuple[int, int], count: int, *, flip: bool = True, seed: str = "",
) -> tuple[Float[Tensor, "n 3 height width"], list[str]]:
    """`count` views of the folder's pictures in -1..1 and a prompt for each; every picture about equally often.

    size: (width, height). The first view of each picture is the picture itself: its middle, not mirrored, on white.
    """
    plain = captions.plain(trigger, category)
    seen = np.empty((max(count, len(folder)), size[1], size[0], 3), np.uint8)
    prompts = [""] * len(seen)
    for which, file in enumerate(folder.files):
        picture = opened(file)
        for number in range(which, len(seen), len(folder)):
            rng = random.Random(f"{seed}/{number}")
            seen[number] = _view(picture, size, rng, flip, first=number == which)
            prompts[number] = folder.captions.get(which) or rng.choice(plain)
    pixels = torch.from_numpy(seen).permute(0, 3, 1, 2)
    return pixels.to(torch.get_default_dtype()) / 127.5 - 1, prompts


def _view(picture: Image.Image, size: tuple[int, int], rng: random.Random, flip: bool, first: bool) -> np.ndarray:
    """(height, width, 3) uint8: the largest part of the model's shape, or a little less of it somewhere near."""
    scale = min(picture.width / size[0], picture.height / size[1])  # pixels of the picture per pixel of the view
    near = 1.0 if first else 1 - SHIFT * rng.random()
    wide, high = scale * near * size[0], scale * near * size[1]
    left, top = ((room if first else min(max(room + rng.uniform(-1, 1) * SHIFT * side, 0), 2 * room))
                 for room, side in (((picture.width - wide) / 2, wide), ((picture.height - high) / 2, high)))
    if picture.mode == "RGBA":
        colour = WHITE if first or rng.random() < 0.5 else tuple(rng.randrange(256) for _ in range(3))
        paper = Image.new("RGBA", picture.size, (*colour, 255))
        picture = Image.alpha_composite(paper, picture).convert("RGB")
    seen = picture.resize(size, Image.Resampling.LANCZOS, (left, top, left + wide, top + high), reducing_gap=3.0)
    if flip and not first and rng.random() < 0.5:
        seen = ImageOps.mirror(seen)
    return np.asarray(seen)
