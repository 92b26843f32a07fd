"""LoRA files by name: those bundled with a model, and those in the user's folders."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path

from composition import bundled
from composition.bundled import BUNDLES
from composition.request import Refused


def files(model: str, folders: Sequence[Path] = ()) -> list[Path]:
    """Every LoRA file that can be named, bundled ones first, each folder's in the order of their names."""
    own = [bundled.path(BUNDLES[model].loras)] if model in BUNDLES else []
    places = [*own, *map(Path, folders)]
    return [path for place in places if place.is_dir() for path in sorted(place.rglob("*.safetensors"))]


def find(source: str, model: str, folders: Sequence[Path] = ()) -> Path:
    """The file of `source`: a path that exists, or the name of one file. Raises Refused, with the nearest names."""
    if source.endswith(".safetensors") and Path(source).is_file():
        return Path(source)
    known: dict[str, list[Path]] = {}
    for path in files(model, folders):
        known.setdefault(path.stem, []).append(path)
    found = known.get(source.removesuffix(".safetensors"), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise Refused(f"{len(found)} LoRAs are named {source!r}: give the path of one of "
                      + ", ".join(str(path) for path in found))
    if Path(source).exists():
        kind = "a folder" if Path(source).is_dir() else f"a {Path(source).suffix or 'nameless'} file"
        raise Refused(f"{source!r} is {kind}; a LoRA is a .safetensors file")
    several = [name.strip() for name in source.split(",")]
    if len(several) > 1 and all(name in known for name in several):
        raise Refused(f"{source!r} is {len(several)} LoRAs: give each by itself (--lora {' --lora '.join(several)})")
    for other in BUNDLES:
        if other != model and source in {path.stem for path in files(other)}:
            raise Refused(f"no LoRA is named {source!r} for this model, that one is made for {other}; {_there(known)}")
    near = get_close_matches(source, known, 3, 0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; {_there(known)}"
    raise Refused(f"no LoRA is named {source!r} and no file is there{hint} (a folder of your own is named with --lora-dir)")


def _there(known: Collection[str]) -> str:
    return f"there are {', '.join(sorted(known)) or 'none'}"
