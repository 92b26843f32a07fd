"""Speed LoRAs: distilled so that few steps make a picture (LCM, arXiv 2311.05556; SDXL-Lightning, 2402.13929; Hyper-SD, 2404.13686; SDXL Turbo,
2311.17042; TCD, 2402.19159; DMD2, 2405.14867; PCM, 2405.18407).

They are no concept: they change how the model samples, and are on in every step, row and place whatever a method does with the others.
The tensors of such a file look like any LoRA's, so its names tell: the file's, and what its header says it is called. Two facts of its
structure speak against it: distillation leaves the text encoders alone, and nothing is learned that a trigger word calls. Words that people
also use for styles (lightning, hyper, turbo) count beside a base's name or a number of steps alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from composition.loras import metadata
from composition.loras.keys import modules
from composition.loras.safetensors import load_header
from composition.refusal import Refused
from composition.request import ALWAYS_ON

_WORDS = re.compile(r"\d*[a-z]+|\d+")
_STEPS = re.compile(r"(\d{1,2})[ _.-]?steps?(?![a-z])")
_BASE = r"(?:stable diffusion|sd|xl|sdxl|flux|dev|schnell|alpha)"
_NUMBER = r"(?: \d{1,2})*"  # of a version, between a base's name and the word
_CONCEPT = re.compile(r"(?<![a-z])(?:style|effects?|concept|character|outfit|clothing|pose)(?![a-z])")  # what speed LoRAs do not say of themselves
_PLAIN = {"pytorch lora weights", "adapter model", "diffusion pytorch model", "lora", "model"}  # names that say nothing: the folder's does


@dataclass(frozen=True)
class Kind:
    """A way of distilling. sampler and guidance: what its authors use it with. steps: where a file's name does not say. certain: its word
    means nothing else."""

    title: str
    words: str
    sampler: str
    steps: str
    guidance: str
    certain: bool = True


KINDS = (
    Kind("LCM", r"lcm|latent consistency", "lcm", "4 to 8", "1 to 2"),
    Kind("TCD", r"tcd", "lcm", "4 to 8", "1"),
    Kind("PCM", r"pcm", "ddim", "4 to 8", "1 to 2", False),
    Kind("DMD2", r"dmd ?2", "lcm", "4", "1"),
    Kind("Lightning", r"lightning", "euler", "4 to 8", "1", False),
    Kind("Hyper", r"hyper", "ddim", "8", "1", False),
    Kind("Turbo", r"turbo", "euler-a", "1 to 4", "1", False),
)


@dataclass(frozen=True)
class Speed:
    """kind: of which. steps: that its name says, "" without. flux: made for a model that guidance was distilled into. guided: made for
    guidance, as its name says. faint: its authors use it at an eighth of its weight."""

    kind: Kind
    steps: str = ""
    flux: bool = False
    guided: bool = False
    faint: bool = False

    def advice(self) -> str:
        """What it is and what it needs, as a remark of a receipt."""
        steps = self.steps or ("8" if self.flux else self.kind.steps)
        needs = [f"{steps} step{'s' * (steps != '1')}"]
        needs += [] if self.flux else [f"sampler {self.kind.sampler}", f"guidance {'5 to 8' if self.guided else self.kind.guidance}"]
        needs += ["weight 0.125"] if self.faint else []
        return f"a speed LoRA ({self.kind.title}): on in every step, row and place; made for {', '.join(needs)}"


def recognise(path: Path, header: Mapping[str, str], components: Iterable[str]) -> Speed | None:
    """What kind of speed LoRA a file is, None for any other. components: that its tensors are of, "" where their names do not say.

    A file whose header says another category is none.
    """
    if metadata.category(header) not in ("", ALWAYS_ON) or metadata.triggers(header) or any(name.startswith("text_encoder") for name in components):
        return None
    for name in _names(path, header):
        text = " ".join(_WORDS.findall(name))
        steps = _STEPS.search(name)
        for kind in KINDS:
            word = rf"(?<![a-z0-9])(?:{kind.words})(?![a-z0-9])"
            beside = rf"{_BASE}{_NUMBER} {word}|{word} {_BASE}(?![a-z])|{word} \d?{_BASE}\d*(?![a-z])"
            if re.search(word, text) and (kind.certain or steps or re.search(beside, text) and not _CONCEPT.search(text)):
                flux, hyper = "flux" in text, kind.title == "Hyper"
                return Speed(kind, steps[1].lstrip("0") if steps else "", flux, hyper and "cfg" in text, hyper and (flux or "sd 3" in text))
    return None


def is_one(path: Path) -> bool:
    """Whether the header of a file says so, or its name; False for a file that cannot be read. A header is read once per change."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return _is_one(path, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=4096)
def _is_one(path: Path, stamp: tuple[int, int]) -> bool:
    try:
        raw = load_header(path)
    except Refused:
        return False
    category = metadata.category(raw.metadata)
    return category == ALWAYS_ON or not category and recognise(path, raw.metadata, {module.component for module in modules(raw.tensors)[0]}) is not None


def _names(path: Path, header: Mapping[str, str]) -> list[str]:
    """What the file is called, by itself and in its header, in small letters, a name in humps taken apart."""
    stem = path.stem
    bare = " ".join(_WORDS.findall(stem.lower()))
    names = [stem, path.parent.name if bare in _PLAIN else "", metadata.title(header), metadata.alias(header)]
    return [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name[: metadata.MAX_LETTERS]).lower() for name in names if name]
