"""From a request to pictures in a folder: open the engine quietly, run with a progress bar, stop on Ctrl-C."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from app import record, settings
from app.places import sheet as draw_places
from app.strip import strip
from composition import Cancelled, Receipt, Refused, Request, Result, models

if TYPE_CHECKING:
    from composition import Engine


SMALL = 30e6  # parameters under which a denoiser on a processor runs in one thread


@dataclass(frozen=True)
class Place:
    """Where and how the engine runs: the flags that are no part of a request."""

    device: str | None = None
    dtype: str | None = None
    offload: str = "auto"
    folders: tuple[Path, ...] = ()
    quantise: str | None = None
    denoiser: str | None = None


def folders(given: Sequence[Path]) -> tuple[Path, ...]:
    """The user's LoRA folder, when it is there, and the given ones. Raises Refused for one that is not."""
    for folder in given:
        if not folder.is_dir():
            raise Refused(f"--lora-dir {folder} is not a folder")
    own = settings.lora_folder()
    return tuple(dict.fromkeys([*([own] if own.is_dir() else []), *given]))


def prepare(model: str, *, judge: str = "pocket") -> None:
    """Set the stage before torch is imported: the libraries say nothing that is no error, reach no network for a model
    and a judge that are on this machine, and their threads sleep while they wait (spinning, on cores that something else
    wants too, was measured forty times slower)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not os.environ.get("MEDLEY_DEBUG"):
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao, where it is installed
    here = ("/" not in model and model not in models.KNOWN) or Path(model).exists()  # a hub id has an owner
    if here and (judge == "pocket" or Path(judge).is_dir()):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def open_engine(model: str, place: Place) -> "Engine":
    prepare(model)
    import torch

    from composition import Engine

    engine = Engine.open(model, device=place.device, dtype=place.dtype, offload=place.offload, folders=place.folders,
                         quantise=place.quantise, denoiser=place.denoiser)
    if engine.device.type == "cpu" and sum(part.numel() for part in engine.backbone.denoiser.parameters()) < SMALL:
        torch.set_num_threads(1)  # its layers are over before a second thread is awake: measured 1.6 times faster
    return engine


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the run stops between two evaluations; a second one ends at once."""
    event = threading.Event()

    def stop(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


class Bench:
    """An open engine at work for one command: one progress bar over all its runs, one event to stop them."""

    def __init__(self, engine: "Engine", progress: Progress, cancel: threading.Event, steps: int) -> None:
        self.engine = engine
        self._progress, self._cancel = progress, cancel
        self._task = progress.add_task("", total=steps)
        self._done = 0.0

    def run(self, request: Request, title: str) -> Result:
        """Make one picture; `title` stands before the bar. Raises Cancelled after Ctrl-C."""
        self._progress.update(self._task, description=title)
        begun = self._done
        result = self.engine.run(
            request, cancel=self._cancel, on_step=lambda event: self._show(begun + request.length * event.index / event.count))
        self._show(begun + request.length)
        if self._cancel.is_set():  # Ctrl-C after the last evaluation
            raise Cancelled("cancelled")
        return result

    def save(self, result: Result, folder: Path, stem: str = "") -> Path:
        from composition.backbones import samplers

        own = samplers.title(result.request.sampler, self.engine.backbone.scheduler)
        return record.save(result, folder, stem, sampler=own)

    def skip(self, request: Request) -> None:
        self._show(self._done + request.length)

    @property
    def done(self) -> float:
        """Steps shown as done."""
        return self._done

    @property
    def cancel(self) -> threading.Event:
        """What Ctrl-C sets."""
        return self._cancel

    def show(self, done: float, title: str) -> None:
        """So many of all steps are done; `title` stands before the bar."""
        self._progress.update(self._task, description=title)
        self._show(done)

    def advance(self, steps: float, title: str) -> None:
        """So many more steps are done, or need not be."""
        self.show(self._done + steps, title)

    def _show(self, done: float) -> None:
        self._done = max(self._done, done)
        self._progress.update(self._task, completed=self._done)


@contextmanager
def bench(engine: "Engine", steps: int, console: Console) -> Iterator[Bench]:
    """The engine with a progress bar over `steps` steps on `console`, and Ctrl-C caught, for one group of runs."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with stoppable() as cancel, engine.group(), bar as progress:
        yield Bench(engine, progress, cancel, steps)


def pictures(at: Bench, request: Request, folder: Path, stem: str = "") -> Iterator[tuple[Path, Result]]:
    """Every picture of the request by itself, written as soon as it is made: each one's record makes it again."""
    for index in range(request.count):
        result = at.run(request.alone(index), request.method)
        name = f"{stem}-{record.free(folder, f'{stem}-'):04d}" if stem else ""
        yield at.save(result, folder, name), result


def places(path: Path, result: Result) -> Path | None:
    """Where each concept is, drawn, beside the picture as `<its name>-masks.png`; None where the method has no places."""
    drawn = draw_places(result.images[0], result.notes)
    return record.publish(drawn, path.parent, f"{path.stem}-masks") if drawn else None


@dataclass(frozen=True)
class Tile:
    """One way of making the same picture: where it is, what came of it, or why it was not made."""

    title: str
    path: Path | None = None
    result: Result | None = None
    refused: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.result.seconds.values()) if self.result else 0.0

    @property
    def evaluations(self) -> int:
        return round(self.result.notes.get("evaluations", 0)) if self.result else 0


def compare(
    at: Bench, request: Request, ways: Mapping[str, Mapping[str, Any]], folder: Path, prefix: str
) -> tuple[list[Tile], Path]:
    """The request's first picture from the prompt alone and by each method (name to options): tiles, and their strip.

    A method that refuses the request is left out and says why; Refused is raised when all do.
    """
    from app import profiles
    from composition import methods

    stem = f"{prefix}-{record.free(folder, f'{prefix}-'):04d}"
    alone = request.alone(0)
    tiles = [_tile(at, replace(alone, loras=(), method="merge", options={}), "Prompt only", folder, f"{stem}-prompt")]
    for name, options in ways.items():
        way = profiles.pinned(replace(alone, method=name, options=options), at.engine)[0]
        tiles.append(_tile(at, way, methods.find(name).title, folder, f"{stem}-{name}"))
    refused = [tile for tile in tiles[1:] if tile.refused]
    if len(refused) == len(ways):
        raise Refused(refused[0].refused if refused else "no method to compare")
    used = ", ".join(name if weight == 1 else f"{name} {weight:g}" for name, weight in request.weights.items())
    caption = f"{request.prompt}  [{used or 'no LoRA'}]  seed {request.seed}"
    shown = [(tile.result.images[0], tile.title, f"{tile.seconds:.1f} s, {tile.evaluations} evaluations")
             for tile in tiles if tile.result]
    return tiles, record.publish(strip(shown, caption), folder, f"{stem}-strip")


def _tile(at: Bench, request: Request, title: str, folder: Path, stem: str) -> Tile:
    try:
        result = at.run(request, title)
    except Refused as error:
        at.skip(request)
        return Tile(title, refused=str(error))
    return Tile(title, at.save(result, folder, stem), result)


def reproduction(made: record.Record, receipts: Mapping[str, Receipt]) -> list[str]:
    """How this run differs from the recorded one: LoRA files that changed, other versions of the libraries."""
    if not made.ours:
        return []
    found = [f"LoRA {name} is not the file it was made with (sha256 {str(old.get('sha256'))[:12]}, now "
             f"{receipts[name].sha256[:12]})" + ("; its tensors are the same" if old.get("tensor_sha256") ==
                                                  receipts[name].tensor_sha256 else "; the picture will differ")
             for name, old in made.receipts.items() if name in receipts and old.get("sha256") != receipts[name].sha256]
    now = record.versions()
    return found + [f"made with {name} {old}, this is {now[name]}" for name, old in made.versions.items()
                    if now.get(name, old) != old]
