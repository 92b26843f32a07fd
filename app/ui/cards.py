"""Cards: what the page shows of each LoRA file, from the words and the picture in its header. All of it is untrusted."""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from app.terminal import printable
from composition import pictures, prompt_weights, prompts
from composition.loras import library, metadata
from composition.loras.reader import shown
from composition.loras.safetensors import load_header
from composition.request import Category

PREVIEW = "preview"  # metadata key: a PNG in base64
MAX_LETTERS = 2_000_000  # of that text
MAX_SIDE = 2048  # pixels of the picture in it
SIDE = 128  # pixels of the picture shown
_ORDER = {category: place for place, category in enumerate([*get_args(Category)[1:], ""])}


@dataclass(frozen=True)
class Card:
    """One LoRA. key: its name on the page, unique. source: what a request calls it. preview: a data URL, or "".

    origin: where its trigger words stand. trouble: why the file cannot be used, "" when its header could be read.
    """

    key: str
    source: str
    title: str
    category: str = ""
    triggers: tuple[str, ...] = ()
    preview: str = ""
    trouble: str = ""
    origin: str = ""

    def shown(self) -> dict[str, Any]:
        """What the page gets: no path of this machine."""
        return {"key": self.key, "title": self.title, "category": self.category, "triggers": list(self.triggers),
                "preview": self.preview, "trouble": self.trouble, "origin": self.origin}


def cards(files: Iterable[Path], elsewhere: Sequence[Path] = ()) -> dict[str, Card]:
    """Every file's card by key, in the order of the categories, then of the titles. A header is read once per change.

    files: those that a request may name by their stems; elsewhere: others, which it names by where they lie.
    """
    paths = list(dict.fromkeys([*files, *elsewhere]))
    stems = [printable(shown(path.stem)) for path in paths]
    counts = Counter(stems)
    by_key: dict[str, Card] = {}
    for path, stem in zip(paths, stems, strict=True):
        alone = counts[stem] == 1 and path not in elsewhere
        key = stem if counts[stem] == 1 else f"{stem} ({printable(shown(path.parent.name))})"
        while key in by_key:
            key += "'"
        title, category, triggers, preview, trouble, origin = _read(path, library.stamp(path))
        by_key[key] = Card(key, path.stem if alone else str(path), title or key, category, triggers, preview, trouble, origin)
    return dict(sorted(by_key.items(), key=lambda pair: (_ORDER[pair[1].category], pair[1].title.lower(), pair[0])))


def lacking(prompt: str, chosen: Iterable[Card]) -> list[Card]:
    """The cards of which the prompt has no trigger word, as the engine counts them."""
    return [card for card in chosen if prompts.lacks(prompt_weights.plain(prompt), card.triggers)]


def with_words(prompt: str, words: Sequence[str]) -> str:
    """The prompt with these words at its end, those it has already left out."""
    for word in words:
        if not prompts.says(prompt_weights.plain(prompt), word):
            word = prompt_weights.escaped(word)
            prompt = f"{prompt.rstrip().rstrip(',')}, {word}" if prompt.strip() else word
    return prompt


@lru_cache(maxsize=4096)
def _read(path: Path, stamp: tuple[int, int]) -> tuple[str, str, tuple[str, ...], str, str, str]:
    """(title, category, triggers, preview, trouble, origin) of a file in the state that `stamp` stands for."""
    try:
        header = load_header(path).metadata
        origin = next((f"its file's {field}" for field in ("trigger_words", "modelspec.trigger_phrase") if header.get(field)), "")
        return (printable(metadata.title(header)), metadata.category(header), metadata.triggers(header), _picture(header.get(PREVIEW, "")), "", origin)
    except Exception as error:  # one file, whatever is wrong with it, does not take the others down
        return "", "", (), "", printable(library.trouble(error)), ""


def _picture(text: str) -> str:
    """The picture in a header as a small PNG of our own in a data URL; "" when there is none that can be trusted."""
    if not text or len(text) > MAX_LETTERS:
        return ""
    try:
        small = pictures.load(base64.b64decode(text, validate=True), "a preview", MAX_SIDE**2, ("PNG",)).convert("RGB")
    except ValueError:  # of base64, or Refused
        return ""
    small.thumbnail((SIDE, SIDE))
    return data_url(small)


def data_url(image: Image.Image) -> str:
    """The pixels alone, as a PNG in a data URL."""
    file = io.BytesIO()
    Image.frombytes(image.mode, image.size, image.tobytes()).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
