"""LoRA files by name: those bundled with a model, and those in the user's folders, by the names that people and other tools use."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from composition import bundled
from composition.bundled import BUNDLES
from composition.loras import condition, controls, metadata, reader
from composition.loras import folders as lora_folders
from composition.loras.condition import Settings
from composition.loras.safetensors import ENDING, load_header
from composition.refusal import Refused
from composition.request import Receipt

MOST_NAMED = 40  # files that a refusal names


class Known:
    """The LoRA files that can be named beside a model, as one walk saw them: what `find` chooses from.

    conditions: condition LoRAs are bundled ones. alias: the trainer's name for a file, "" without.
    """

    def __init__(self, model: str, folders: Sequence[Path] = (), *, conditions: bool = False, alias: Callable[[Path], str] | None = None) -> None:
        self.places = _places(model, folders, conditions)
        self.walk = lora_folders.walk(self.places)
        self._alias = alias or trainers_name

    @cached_property
    def _by_end(self) -> dict[str, list[tuple[Path, Path]]]:
        """The rows of the walk by the last part of a path without its ending, which whatever names a file by its path has."""
        by_end: dict[str, list[tuple[Path, Path]]] = {}
        for row in self.walk.rows:
            end = row[1].name[: -len(ENDING)]
            if end in ("", "."):
                end = "".join(_parts(_bare(row[1].as_posix()))[-1:])
            by_end.setdefault(end, []).append(row)
        return by_end

    def ending(self, end: str) -> Sequence[tuple[Path, Path]]:
        return self._by_end.get(end, ())

    def aliased(self, alias: str) -> list[Path]:
        return [path for _, path in self.walk.rows if self._alias(path) == alias] if alias else []


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


def find(source: str, model: str, folders: Sequence[Path] = (), *, conditions: bool = False, known: Known | None = None) -> Path:
    """The file of `source`; with `conditions`, of a condition LoRA. Raises Refused, with the nearest names.

    In this order: a path to a file; the name of one file, with or without its folders and its ending ("owl", "animals/owl",
    "animals\\owl.safetensors"); a path without its ending; the name that the trainer wrote into one file (ss_output_name).
    known: the files, where they were looked for already.
    """
    if path := direct(source):
        return path
    known = known or Known(model, folders, conditions=conditions)
    several = matching(source, known, conditions)
    if len(several) > 1:
        raise Refused(f"{len(several)} LoRAs are named {source!r}: give the path of one of " + _listed(list(map(str, several))))
    if not several and not conditions and (reads := _reads_pictures(source, model, folders)):
        raise Refused(reads)
    if not several:
        if not conditions and (reads := _reads_pictures(source, model, folders)):
            raise Refused(reads)
        raise Refused(_nothing(source, model, [path.stem for _, path in known.walk.rows], conditions))
    return several[0]


def direct(source: str) -> Path | None:
    """The file of which `source` is the path; its ending is not left out."""
    paths = map(Path, _spellings(source))
    return next((path for path in paths if path.suffix.lower() == ENDING and os.path.isfile(path)), None)


def matching(source: str, known: Known, conditions: bool = False) -> list[Path]:
    """The files that `source` names if it is not `direct`, by the first way of naming one that names any: `find` takes one alone."""
    for several in _candidates(_spellings(source), known):
        if len(several) > 1:
            several = [path for path in several if _is_condition(path, stamp(path)) == conditions] or several
        if several:
            return several
    return []


def _spellings(source: str) -> Collection[str]:
    return dict.fromkeys((source, source.replace("\\", "/")))


def _candidates(spellings: Collection[str], known: Known) -> Iterator[list[Path]]:
    """The files of that name, by every way of naming a file in turn."""
    for spelling in spellings:
        wanted = _parts(_bare(spelling))
        if wanted and ".." not in wanted:
            rows = known.ending(wanted[-1])
            whole = [path for place, path in rows if _parts(_bare(path.relative_to(place).as_posix())) == wanted]
            yield _distinct(whole if len(wanted) > 1 else [])
            yield _distinct([path for _, path in rows if _parts(_bare(path.as_posix()))[-len(wanted) :] == wanted])
            yield _distinct([path for place in known.places if (path := _ended(place.joinpath(*wanted)))])  # a folder reached by another path
    for spelling in spellings:
        yield _distinct([path] if (path := _ended(Path(_bare(spelling)))) else [])
    for spelling in spellings:
        yield _distinct(known.aliased(_bare(spelling)))


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


def trainers_name(path: Path) -> str:
    """The trainer's name in a file's header; "" where there is none, or no header. A header is read once per change."""
    return _alias(path, stamp(path))


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
    return lora_folders.walk(_places(model, folders, conditions)).rows


def _listed(names: Sequence[str]) -> str:
    """Names one after another; of thousands the first."""
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else "")


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
    there = f"there are {_listed(sorted(set(known))) or 'none'}"
    for other in BUNDLES:
        if other != model and source in {path.stem for _, path in _files(other, (), conditions)}:
            return f"no {kind} is named {source!r} for this model, that one is made for {other}; {there}"
    source = source if len(source) <= 200 else f"{source[:200]}..."
    near = get_close_matches(source, known, 3, 0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; {there}"
    return f"no {kind} is named {source!r} and no file is there{hint} (a folder of your own is named with --lora-dir)"
