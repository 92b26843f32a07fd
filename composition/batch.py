"""Many requests into one folder of pictures: what is there is skipped, what fails is recorded, and a stop loses the picture in work.

Each picture is `pictures/<id>.png` with its whole request inside. `made.jsonl` is the log: what a PNG must not hold (seconds), and what
failed. A picture's line is on the disk before the picture has its name, so that a picture that is there has its line.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from composition import atomic, lock, record
from composition.log import Log
from composition.refusal import Cancelled, Refused, explain
from composition.request import Request, Result
from composition.version import __version__

if TYPE_CHECKING:
    from composition.engine import Engine, Event

PICTURES, LOG, LOCK = "pictures", "made.jsonl", ".batch.lock"
SMALL = 2**26  # bytes under which a model's file is known by its content, above by its size and time
MODEL_FILES = {".safetensors", ".json", ".txt", ".model", ".gguf"}


@dataclass(frozen=True)
class Item:
    """One picture of a batch, or why there is none.

    index: of its request among the requests. request: settled, and of this picture alone; as it was asked for where it could not be
    settled. path: None when it failed. id: what it depends on, as 20 hexadecimal digits ("" where a file of it is missing). seconds,
    evaluations: what it cost when it was made. error: a sentence, "" for none. fresh: made now, not found there. order: how the order
    of its LoRAs was settled, "" where the method has none.
    """

    index: int
    request: Request
    path: Path | None = None
    id: str = ""
    seconds: float | None = None
    evaluations: int | None = None
    error: str = ""
    fresh: bool = False
    order: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a batch is, of what was not there when it began; what failed counts as done. done, steps: of `pictures`, `of_steps`."""

    done: int
    pictures: int
    steps: float
    of_steps: int


def plainly(error: Exception) -> str:
    """An error as a sentence, where nobody above knows better words."""
    if isinstance(error, ValidationError):
        return explain(error)
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"


def run_many(
    engine: "Engine", requests: Sequence[Request], folder: Path, *, on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None, files: Sequence[Path] = (), sentence: Callable[[Exception], str] = plainly,
) -> Iterator[Item]:
    """Every picture of every request, in order; a request of three pictures gives three items.

    One that fails is an item with its error, and is tried again by the next call. The engine is held in a group until the iterator ends
    or is closed. cancel: when set, Cancelled is raised before the next evaluation. files: further files that the pictures depend on
    (another denoiser than the model's). sentence: an error in the user's words; what it raises itself ends the batch. Raises Refused
    for a folder that cannot be written to, and OSError when the log cannot.
    """
    record.ready(folder)
    return _Batch(engine, Store(folder), on_progress, cancel, sentence).items(requests, files)


class Store:
    """The pictures of a folder by their id, and the log of their making. `opened` before anything is asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pictures, self.log = folder, folder / PICTURES, Log(folder / LOG)
        self.known: dict[str, dict[str, Any]] = {}
        self.listed: set[Any] = set()  # the pictures' files that the manifest has

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder alone, and put right what a kill left. Raises Refused when another batch is at work in it."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        with lock.alone(self.folder / LOCK, f"another batch is at work in {self.folder}"):
            atomic.sweep(self.pictures)
            self.known = {row["id"]: row for row in self.log.rows() if row.get("id") and not row.get("error")}
            self.listed = {row.get("file_name") for row in Log(self.pictures / record.MANIFEST).rows()}
            yield

    def path(self, name: str) -> Path:
        return self.pictures / f"{name}.png"

    def has(self, name: str) -> bool:
        return name in self.known and self.path(name).is_file()

    def add(self, item: Item, result: Result) -> None:
        """The line, then the picture. A picture of this name without a line is not ours to trust, and goes."""
        self.path(item.id).unlink(missing_ok=True)
        row = {"id": item.id, "method": item.request.method, "seed": item.request.seed, "seconds": round(sum(result.seconds.values()), 4),
               "evaluations": int(result.notes.get("evaluations", 0)), "medley": __version__}  # fmt: skip
        self.log.append(row)
        record.save(result, self.pictures, item.id)
        self.known[item.id] = row
        self.listed.add(self.path(item.id).name)

    def completed(self, item: Item) -> Item:
        """The item with its picture and what it cost; a line of the manifest that a kill left out is added."""
        path, row = self.path(item.id), self.known[item.id]
        if path.name not in self.listed:
            record.relist(path, item.request)
            self.listed.add(path.name)
        return replace(item, path=path, seconds=row.get("seconds"), evaluations=row.get("evaluations"))

    def fail(self, item: Item) -> None:
        self.log.append({"id": item.id, "error": item.error, "request": json.loads(item.request.json()), "medley": __version__})


class _Batch:
    """One call of `run_many`: the requests are settled and named first, so that what is left to do is known from the beginning."""

    def __init__(
        self, engine: "Engine", store: Store, on_progress: Callable[[Progress], None] | None, cancel: threading.Event | None,
        sentence: Callable[[Exception], str],
    ) -> None:
        self.engine, self.store, self.cancel, self.sentence = engine, store, cancel, sentence
        self.on_progress = on_progress or (lambda progress: None)
        self.progress = Progress(0, 0, 0, 0)

    def items(self, requests: Sequence[Request], files: Sequence[Path]) -> Iterator[Item]:
        with ExitStack() as stack:
            stack.enter_context(self.store.opened())
            identity = Identity(self.engine, files)
            planned = [item for index, request in enumerate(requests) for item in self._planned(index, request, identity)]
            missing = {item.id: item.request.length for item in planned if item.id and not self.store.has(item.id)}
            self._show(pictures=len(missing), of_steps=sum(missing.values()))
            if missing:
                stack.enter_context(self.engine.group())
            failed: dict[str, Item] = {}  # of equal requests the second fails as the first did
            for position, item in enumerate(planned):
                if item.id and not self.store.has(item.id):
                    self._read_ahead(planned[position + 1 :], item)
                    item = replace(failed[item.id], index=item.index) if item.id in failed else self._make(item)
                if item.error:
                    failed.setdefault(item.id, item)
                    self.store.fail(item)
                yield item if item.error else self.store.completed(item)

    def _planned(self, index: int, request: Request, identity: "Identity") -> list[Item]:
        self._stop()
        try:
            settled, notes = self.engine.settle(request)
            pictures = [settled.alone(number) for number in range(settled.count)]
            return [Item(index, picture, id=identity.of(picture), order=notes.get("order", "")) for picture in pictures]
        except Exception as error:  # one request's trouble is not the next one's
            why = self.sentence(error)
            return [Item(index, request.alone(number), error=why) for number in range(request.count)]

    def _read_ahead(self, later: Sequence[Item], now: Item) -> None:
        """Let the LoRAs of the next picture that is missing be read while this one is drawn, where they are others."""
        upcoming = next((item for item in later if item.id and not self.store.has(item.id)), None)
        if upcoming is not None and upcoming.request.loras != now.request.loras:
            self.engine.prefetch(upcoming.request)

    def _make(self, item: Item) -> Item:
        """Make the picture; the item says so, or why not."""
        self._stop()
        before, length = self.progress, item.request.length

        def show(event: "Event") -> None:
            self._show(steps=before.steps + length * event.index / event.count)

        try:
            result = self.engine.run(item.request, on_step=show, cancel=self.cancel)
            self.store.add(item, result)
            item = replace(item, fresh=True)
        except Cancelled:
            raise
        except Exception as error:
            item = replace(item, error=self.sentence(error))
        self._show(done=before.done + 1, steps=before.steps + length)
        return item

    def _stop(self) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("cancelled")

    def _show(self, **changes: Any) -> None:
        self.progress = replace(self.progress, **changes)
        self.on_progress(self.progress)


class Identity:
    """What a picture of an engine depends on: the settled request, the bytes of its files, the model's files, the number type, the
    kind of device and the versions of the libraries."""

    def __init__(self, engine: "Engine", files: Sequence[Path] = ()) -> None:
        self._engine = engine
        weights = engine.backbone.denoiser.parameters()
        kinds = sorted({f"{type(part).__name__} {part.dtype}" for part in weights})  # a quantised model has others
        self._same = [model_stamps(engine.name), [_stamp(path) for path in files], kinds, str(engine.device.type), str(engine.dtype),
                      record.versions(), *([engine.backbone.vae_sha256] if engine.vae else [])]  # fmt: skip
        self._digests: dict[tuple[Path, int, int], str] = {}

    def of(self, request: Request) -> str:
        """The id, 20 hexadecimal digits, of a settled request, which has its masks and the pictures of its conditions in it.

        Raises Refused for a LoRA that is not there."""
        from composition import inversions
        from composition.loras import controls  # it brings torch, which a command that draws nothing does without

        paths = [self._engine.find(lora.source) for lora in request.loras]
        paths += inversions.sources(request.embeddings, self._engine.find)
        for condition in request.conditions:  # of a ControlNet's folder its weights
            path = self._engine.find_condition(condition.source)
            paths += controls.weights(path) if path.is_dir() else [path]
        digests = [self._digest(path) if os.path.isfile(path) else "" for path in paths]
        return hashlib.sha256(json.dumps([request.json(), digests, self._same], sort_keys=True).encode()).hexdigest()[:20]

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        key = path, stat.st_mtime_ns, stat.st_size
        if key not in self._digests:
            self._digests[key] = _sha256(path)
        return self._digests[key]


def model_stamps(name: str) -> list[Any]:
    """What tells a model's files from others of the same name: the bytes of small ones, size and time of large ones; of a model of the
    hub the revision that is in the cache. The name alone where an engine was built around a pipeline of the caller's own."""
    from huggingface_hub import try_to_load_from_cache

    from composition.backbones.loading import open as opening

    try:
        place = opening.find(name)
    except Refused:
        return [name]
    if place.path is None:
        cached = try_to_load_from_cache(place.source, "model_index.json")
        return [place.source, Path(cached).parent.name if isinstance(cached, str) else ""]
    if place.path.is_file():
        return [place.path.name, _stamp(place.path)]
    parts = ((path, path.relative_to(place.path)) for path in sorted(place.path.rglob("*")))
    return [[short.as_posix(), _stamp(path)] for path, short in parts
            if path.suffix in MODEL_FILES and path.is_file() and not any(part.startswith(".") for part in short.parts)]  # fmt: skip


def _stamp(path: Path) -> str:
    stat = path.stat()
    return _sha256(path) if stat.st_size < SMALL else f"{stat.st_size} {stat.st_mtime_ns}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
