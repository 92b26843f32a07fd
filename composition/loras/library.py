"""LoRA files by name: those bundled with a model, and those in the user's folders, by the names that people and other tools use."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from composition import bundled
from composition.bundled import BUNDLES
from composition.loras import condition, controls, metadata, reader
from composition.loras.condition import Settings
from composition.loras.safetensors import ENDING, load_header
from composition.refusal import Refused
from composition.request import Receipt

MAX_FOLDERS = 20_000  # searched below one folder: more are not a library of LoRAs but a link to a whole disk


class Listed(NamedTuple):
    """A file of a listing. receipt: what its header tells, None where `trouble` says why it cannot be read. size: bytes, None unknown."""

    path: Path
    receipt: Receipt | None
    trouble: str
    size: int | None


def files(model: str, folders: Sequence[Path] = ()) -> list[Path]:
    """Every LoRA file that can be named, bundled ones first, each folder's in the order of their names.

    What only has a file's name (a folder, a pipe, a link to nothing) is in it too, so that a listing can say why it is no file. Links to folders are followed; a folder that several ways lead to is searched once. Raises Refused for a folder with too many.
    """
    return [path for _, path in _files(model, folders)]


def listing(model: str, folders: Sequence[Path] = (), *, hashes: bool = False) -> Iterator[Listed]:
    """Every file with what its header tells, whatever is wrong with any of them. hashes: read the files whole, for all of it."""
    for path in files(model, folders):
        receipt, reason, size = None, "", None
        with suppress(OSError):
            size = path.stat().st_size
        try:
            receipt = reader.inspect(path) if hashes else reader.describe(path)
        except Exception as error:  # one file, whatever is wrong with it, does not take the others down
            reason = trouble(error)
        yield Listed(path, receipt, reason, size)


def trouble(error: Exception) -> str:
    """Why a file of a listing cannot be read, in one line."""
    if isinstance(error, Refused):
        return str(error)
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return f"cannot be read: {' '.join(str(reason).split())[:200]}"


def condition_loras(model: str, folders: Sequence[Path] = ()) -> list[tuple[Path, Settings | None, bool]]:
    """Every condition LoRA and control LoRA that can be named; others are passed over.

    With what a condition LoRA's header tells, None of a control LoRA, and whether it came with the model.
    """
    rows, own = [], _places(model, (), conditions=True)
    for place, path in _files(model, folders, conditions=True):
        with suppress(Exception):  # one file, whatever is wrong with it, does not take the others down
            if _is_condition(path, stamp(path)):
                rows.append((path, condition.describe(path)[0], place in own))
            elif controls.recognise(path).kind == "control-lora":
                rows.append((path, None, place in own))
    return rows


def find(source: str, model: str, folders: Sequence[Path] = (), *, conditions: bool = False) -> Path:
    """The file of `source`; with `conditions`, of a condition LoRA. Raises Refused, with the nearest names.

    In this order: a path to a file; the name of one file, with or without its folders and its ending ("owl", "animals/owl",
    "animals\\owl.safetensors"); a path without its ending; the name that the trainer wrote into one file (ss_output_name).
    """
    spellings = dict.fromkeys((source, source.replace("\\", "/")))
    for path in map(Path, spellings):
        if path.suffix.lower() == ENDING and os.path.isfile(path):
            return path
    known = _files(model, folders, conditions)
    for several in _candidates(spellings, known, _places(model, folders, conditions)):
        if len(several) > 1:
            several = [path for path in several if _is_condition(path, stamp(path)) == conditions] or several
        if len(several) == 1:
            return several[0]
        if several:
            raise Refused(f"{len(several)} LoRAs are named {source!r}: give the path of one of " + ", ".join(map(str, several)))
    if not conditions and (reads := _reads_pictures(source, model, folders)):
        raise Refused(reads)
    raise Refused(_nothing(source, model, [path.stem for _, path in known], conditions))


def _candidates(spellings: Collection[str], known: Sequence[tuple[Path, Path]], places: Sequence[Path]) -> Iterator[list[Path]]:
    """The files of that name, by every way of naming a file in turn."""
    for spelling in spellings:
        wanted = _parts(_bare(spelling))
        if wanted and ".." not in wanted:
            whole = [path for place, path in known if _parts(_bare(path.relative_to(place).as_posix())) == wanted]
            yield _distinct(whole if len(wanted) > 1 else [])
            yield _distinct([path for _, path in known if _parts(_bare(path.as_posix()))[-len(wanted) :] == wanted])
            yield _distinct([path for place in places if (path := _ended(place.joinpath(*wanted)))])  # a folder reached by another path
    for spelling in spellings:
        yield _distinct([path] if (path := _ended(Path(_bare(spelling)))) else [])
    for spelling in spellings:
        yield _distinct([path for _, path in known if _alias(path, stamp(path)) == _bare(spelling)])


def _bare(name: str) -> str:
    return re.sub(rf"(?i){re.escape(ENDING)}$", "", name)


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _distinct(paths: Sequence[Path]) -> list[Path]:
    """Each file once, by the first of the paths that lead to it."""
    return list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]


def _ended(path: Path) -> Path | None:
    """The file of this path with .safetensors, in any case, behind it."""
    name = f"{path.name}{ENDING}".lower()
    try:
        if not path.name or (exact := path.with_name(path.name + ENDING)).is_file():
            return exact if path.name else None
        return next((near for near in path.parent.iterdir() if near.name.lower() == name and near.name.startswith(path.name) and near.is_file()),
                    None)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=4096)
def _is_condition(path: Path, stamp: tuple[int, int]) -> bool:
    """Whether a file in the state that `stamp` stands for is a condition LoRA; False for one without a header that can be read."""
    try:
        return condition.is_one(list(load_header(path).tensors))
    except Exception:  # as of _alias
        return False


@lru_cache(maxsize=4096)
def _alias(path: Path, stamp: tuple[int, int]) -> str:
    """The trainer's name in the header of a file in the state that `stamp` stands for; "" where there is none, or no header."""
    try:
        return metadata.alias(load_header(path).metadata)
    except Exception:  # whatever is wrong with a file, it does not take the search for others down
        return ""


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does: its time of change in nanoseconds and its bytes; zeros for one that is not there."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def condition_places(model: str) -> list[Path]:
    """The folders of what reads conditions that came with this model."""
    return _places(model, (), conditions=True)


def _places(model: str, folders: Sequence[Path], conditions: bool = False) -> list[Path]:
    own = (BUNDLES[model].conditions if conditions else BUNDLES[model].loras) if model in BUNDLES else ""
    return [*([bundled.path(own)] if own else []), *map(Path, folders)]


def _files(model: str, folders: Sequence[Path], conditions: bool = False) -> list[tuple[Path, Path]]:
    """(the folder that was named, the file in it) for every LoRA file, in the order of `files`. conditions: condition LoRAs are bundled ones."""
    places = _places(model, folders, conditions)
    by_folder: dict[Path, list[Path]] = {place: [] for place in places}
    links: list[tuple[Path, Path]] = []  # to folders: followed last, so that a folder is searched by its own path where it has one
    seen: set[tuple[int, int]] = set()
    for place in places:
        links += [(place, link) for link in _walk(place, seen, by_folder[place])]
    while links:
        place, link = links.pop(0)
        links += [(place, further) for further in _walk(link, seen, by_folder[place])]
    return [(place, path) for place, paths in by_folder.items() for path in sorted(paths)]


def _walk(folder: Path, seen: set[tuple[int, int]], paths: list[Path]) -> list[Path]:
    """Add the LoRA files of a folder and of those below it to `paths`; returns the links to folders, which are not followed."""
    waiting, links = [folder], []
    while waiting:
        here = waiting.pop()
        try:
            stat = here.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            continue  # not there, no folder, or not ours to read
        if len(seen) > MAX_FOLDERS:
            raise Refused(f"there are over {MAX_FOLDERS} folders in {folder}, links included: name a smaller folder of LoRAs")
        for entry in entries:
            path = here / entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(path)
                if entry.name.lower().endswith(ENDING) and not _has_files(path):
                    paths.append(path)
            elif entry.name.lower().endswith(ENDING):
                paths.append(path)
    return links


def _has_files(folder: Path) -> bool:
    """Whether a folder named like a file holds one, which is then what its name is for."""
    try:
        return any(name.lower().endswith(ENDING) for name in os.listdir(folder))
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself


def _reads_pictures(source: str, model: str, folders: Sequence[Path]) -> str:
    """What to do with the name or the folder of a ControlNet or a condition LoRA that was given for a LoRA; "" for another."""
    named = [path for path in controls.nets([*condition_places(model), *folders]) if source in (path.name, controls.name_of(path))]
    if named or os.path.isdir(source) and controls.recognise(Path(source)).kind:
        return f"{source!r} is a ControlNet, which goes with a picture: --control {source}=PICTURE"
    if any(path.stem == _bare(source) for _, path in _files(model, folders, conditions=True)):
        return f"{source!r} is a condition LoRA, which goes with a picture: --control {source}=PICTURE"
    return ""


def _nothing(source: str, model: str, known: Sequence[str], conditions: bool) -> str:
    """Why no file has that name, and what there is instead."""
    kind = "condition LoRA" if conditions else "LoRA"
    if os.path.exists(source):
        thing = "a folder" if os.path.isdir(source) else f"a {Path(source).suffix or 'nameless'} file"
        return f"{source!r} is {thing}; a {kind} is a .safetensors file"
    several = [name.strip() for name in source.split(",")]
    if len(several) > 1 and all(name in known for name in several):
        return f"{source!r} is {len(several)} LoRAs: give each by itself (--lora {' --lora '.join(several)})"
    there = f"there are {', '.join(sorted(set(known))) or 'none'}"
    for other in BUNDLES:
        if other != model and source in {path.stem for _, path in _files(other, (), conditions)}:
            return f"no {kind} is named {source!r} for this model, that one is made for {other}; {there}"
    source = source if len(source) <= 200 else f"{source[:200]}..."
    near = get_close_matches(source, known, 3, 0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; {there}"
    return f"no {kind} is named {source!r} and no file is there{hint} (a folder of your own is named with --lora-dir)"
