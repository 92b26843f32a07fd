"""Scores of a picture against texts, through any open-clip model: CLIPScore, presence of a concept, leakage.

Pocket brings its own small model with a table of thresholds: presence of "a fox" is a score above what 95 % of fresh
renders without a fox reach (a false-positive rate of 5 %), and the table says how many renders with a fox reach it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from composition import untrusted
from composition.refusal import Refused

THRESHOLDS, CONFUSION = "presence.json", "confusion.json"  # beside a judge's weights
SCALES = {"100": "100 * max(0, cos)", "2.5": "2.5 * max(0, cos)", "cos": "cos"}  # Hessel et al. 2021 (2104.08718): 2.5
OUTER = 0.4  # share of the width examined on either side for a doubled concept; narrower misses some, wider sees false ones


class Threshold(NamedTuple):
    """The score from which a phrase counts as present, and the shares of fresh renders with and without it that reach it."""

    score: float
    recall: float
    false_positives: float


class Judge:
    """An open-clip model with its preparation of pictures and its tokenizer. Open it with `Judge.open`."""

    def __init__(
        self, model: Any, prepare: Any, tokenize: Any, thresholds: Mapping[str, Threshold] | None = None, name: str = "",
        folder: Path | None = None,
    ) -> None:
        """name: what is printed beside every score. folder: where its files are, None when open-clip fetched it."""
        self.model, self.prepare, self.tokenize = model.eval().requires_grad_(False), prepare, tokenize
        self.thresholds, self.name, self.folder = dict(thresholds or {}), name, folder
        self._texts: dict[str, Float[Tensor, " D"]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is now: its inputs are moved there, its outputs come back to the CPU."""
        return next(self.model.parameters()).device

    @classmethod
    def open(cls, name: str = "pocket", device: str = "cpu") -> Judge:
        """"pocket" (bundled), a folder in open-clip's layout, `MODEL:WEIGHTS` as open-clip names them, or `hf-hub:OWNER/NAME`.

        Raises Refused when open-clip is not installed, knows no such model, or no weights are named, and for a folder without
        safetensors weights: others are pickles, which may run code.
        """
        try:
            import open_clip
        except ImportError:
            raise Refused("scores need open-clip: pip install open-clip-torch") from None
        folder = Path(str(files("assets"))) / "pocket128/clip" if name == "pocket" else Path(name)
        parts = _safe_weights(folder, name) if folder.is_dir() else []
        known, weights = (f"local-dir:{folder}", None) if folder.is_dir() else (name, None)
        if not folder.is_dir() and not name.startswith("hf-hub:"):
            known, _, weights = name.partition(":")
            tags = open_clip.list_pretrained_tags_by_model(known)
            if not tags:
                near = get_close_matches(known, open_clip.list_models(), 3, 0.5)
                raise Refused(f"{name!r} is no folder and no model that open-clip knows"
                              + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ""))  # fmt: skip
            if weights not in tags:
                raise Refused(f"{name!r}: say which weights, as {known}:{tags[0]}; there are {', '.join(tags)}")
        try:
            model, _, prepare = open_clip.create_model_and_transforms(known, pretrained=weights, device=device)
            tokenize = open_clip.get_tokenizer(known)
        except Exception as error:  # open-clip raises RuntimeError, ValueError, OSError and the hub's own
            raise Refused(f"{name!r} cannot be opened as an open-clip model: {error}") from error
        if not folder.is_dir():
            return cls(model, prepare, tokenize, name=name)
        table = folder / THRESHOLDS
        with parts[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        return cls(model, prepare, tokenize, read_thresholds(table) if table.is_file() else None, f"{name} {digest}", folder)

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image], part: int = 64) -> Float[Tensor, "n D"]:
        """Pictures of any size as vectors of length 1, on the CPU."""
        seen = []
        for first in range(0, len(pictures), part):
            batch = torch.stack([self.prepare(picture.convert("RGB")) for picture in pictures[first : first + part]])
            seen.append(F.normalize(self.model.encode_image(batch.to(self.device)).float(), dim=-1).cpu())
        return torch.cat(seen)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Float[Tensor, "t D"]:
        """Texts as vectors of length 1, on the CPU; each is encoded once and cached."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for first in range(0, len(fresh), 256):
            some = fresh[first : first + 256]
            vectors = F.normalize(self.model.encode_text(self.tokenize(some).to(self.device)).float(), dim=-1).cpu()
            self._texts |= dict(zip(some, vectors, strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is longer than the model reads: its end is cut off, the end token stays."""
        inner = getattr(self.tokenize, "tokenizer", None)  # open-clip wraps a transformers tokenizer
        room = int(getattr(self.tokenize, "context_length", None) or self.model.context_length)
        if inner is not None:
            clean = getattr(self.tokenize, "clean_fn", lambda text: text)
            return [len(inner(clean(text), truncation=False, verbose=False).input_ids) > room for text in texts]
        return [len(self.tokenize.encode(text)) + 2 > room for text in texts]

    def cosine(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Float[Tensor, "n t"]:
        """Cosine of every picture with every text, -1 to 1."""
        return self.see(pictures) @ self.read(texts).T

    def present(self, pictures: Sequence[Image.Image], phrases: Sequence[str]) -> Bool[Tensor, "n t"]:
        """Whether each phrase reaches its threshold in each picture. Raises Refused for a phrase without a threshold."""
        without = [phrase for phrase in phrases if phrase not in self.thresholds]
        if without:
            raise Refused(f"no threshold is known for {', '.join(map(repr, without))}; set one on renders of it first")
        return self.cosine(pictures, phrases) >= torch.tensor([self.thresholds[phrase].score for phrase in phrases])

    def doubled(self, pictures: Sequence[Image.Image], phrases: Sequence[str]) -> Bool[Tensor, "n t"]:
        """Whether each phrase is present on both sides of each picture: in both outer parts, OUTER of the width each.

        One thing in the middle is in neither part, two things beside each other are one in each: a concept that stands in
        both was drawn twice. Raises Refused as `present` does.
        """
        left, right = zip(*(sides(picture) for picture in pictures), strict=True)
        return self.present(left, phrases) & self.present(right, phrases)


def _safe_weights(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a judge's folder. Raises Refused when open-clip would read a pickle there, by its order of names."""
    safe = sorted(folder.glob("*.safetensors"))
    first = any(part.name in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors") for part in safe)
    pickles = [path for ending in (".bin", ".pth", ".pt") for path in folder.glob(f"*{ending}")]
    if not safe or pickles and not first:
        raise Refused(f"{name!r}: its weights would not be read from a .safetensors file, and others are not opened (they may run code): save "
                      "them as open_clip_model.safetensors")  # fmt: skip
    return safe


def sides(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and the right OUTER of a picture, each in the middle of a square of its mean colour."""
    picture = picture.convert("RGB")
    wide = max(1, round(picture.width * OUTER))
    squares = []
    for first in (0, picture.width - wide):
        part = picture.crop((first, 0, first + wide, picture.height))
        side = max(part.size)
        square = Image.new("RGB", (side, side), part.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
        square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
        squares.append(square)
    return squares[0], squares[1]


def clip_score(cosine: Float[Tensor, "*n"], scale: str = "100") -> Float[Tensor, "*n"]:
    """CLIPScore of each cosine: "100" as torchmetrics has it, "2.5" as Hessel et al. 2021, "cos" as it is.

    Below nothing is nothing, picture by picture (not of the mean). No prefix ("A photo depicts") is put before the text.
    """
    return cosine if scale == "cos" else float(scale) * cosine.clamp(min=0)


def threshold(
    without: Float[Tensor, " n"], with_it: Float[Tensor, " m"], false_positives: float = 0.05
) -> Threshold:
    """The least score that at most this share of the scores `without` the concept reaches, and the recall it leaves."""
    ordered = without.sort(descending=True).values
    allowed = int(len(ordered) * false_positives)
    score = torch.nextafter(ordered[allowed], torch.tensor(float("inf"))).item()
    return Threshold(score, (with_it >= score).float().mean().item(), (without >= score).float().mean().item())


def read_thresholds(file: Path) -> dict[str, Threshold]:
    """Phrase to threshold, as `write_thresholds` wrote them. Raises Refused for a file that is damaged."""
    try:
        rows = untrusted.parse_file(file)
    except untrusted.Unreadable as error:
        raise Refused(f"{file} {error}") from None
    if not isinstance(rows, dict) or not all(_is_row(row) for row in rows.values()):
        raise Refused(f"{file} is no table of thresholds: expected {{\"a fox\": [score, recall, false positives]}}")
    return {phrase: Threshold(*row) for phrase, row in rows.items()}


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(type(number) in (int, float) for number in row)


def write_thresholds(file: Path, table: Mapping[str, Threshold]) -> None:
    """One line a phrase: score, recall, false positives."""
    rows = [f"  {json.dumps(phrase)}: [{t.score!r}, {t.recall:.4f}, {t.false_positives:.4f}]" for phrase, t in sorted(table.items())]
    file.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
