"""An open engine at work for one command or evaluation: a progress bar over all its runs, and Ctrl-C that stops between steps."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from app.errors import sentence
from composition import Cancelled, Request, Result, batch, record

if TYPE_CHECKING:
    from composition import Engine

EVERY = 20.0  # seconds between two lines of progress where there is no terminal


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, or a request to end (SIGTERM, a terminal that closes), so that the run stops between two
    evaluations; a second one ends at once."""
    event = threading.Event()

    def stop(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop)
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Workbench:
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

    def save(self, result: Result, folder: Path, stem: str = "", *, keep_paths: bool = False) -> Path:
        return record.save(result, folder, stem, keep_paths=keep_paths)

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
def bench(engine: "Engine", steps: int, console: Console) -> Iterator[Workbench]:
    """The engine with a progress bar over `steps` steps on `console`, and Ctrl-C caught, for one group of runs."""
    with stoppable() as cancel, engine.group(), _bar(console) as progress:
        yield Workbench(engine, progress, cancel, steps)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<12}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def run_batch(
    engine: "Engine", requests: Sequence[Request], folder: Path, title: str, console: Console, files: Sequence[Path] = ()
) -> Iterator[batch.Item]:
    """`composition.batch.run_many` with its progress on `console`, errors in the user's words, and Ctrl-C caught.

    Raises Cancelled after Ctrl-C. MEDLEY_DEBUG=1: the first error ends the batch.
    """
    with stoppable() as cancel, _display(console, title) as show:
        yield from batch.run_many(engine, requests, folder, on_progress=show, cancel=cancel, files=files, sentence=_sentence)
        if cancel.is_set():  # Ctrl-C after the last evaluation
            raise Cancelled("cancelled")


def _sentence(error: Exception) -> str:
    if os.environ.get("MEDLEY_DEBUG"):
        raise error
    return sentence(error)


@contextmanager
def _display(console: Console, title: str) -> Iterator[Callable[[batch.Progress], None]]:
    """What shows a batch's progress: a bar on a terminal, elsewhere a line now and then, both with the time that is left."""
    with _bar(console) as bar:
        task = bar.add_task(title, total=None)
        begun = last = time.monotonic()
        done = 0

        def show(progress: batch.Progress) -> None:
            nonlocal last, done
            bar.update(task, total=progress.of_steps, completed=progress.steps, description=f"{title} {progress.done}/{progress.pictures}")
            if console.is_terminal or progress.done == done:
                return
            done, now = progress.done, time.monotonic()
            if now - last > EVERY or done == progress.pictures:
                last = now
                console.print(Text(f"{title}: {done} of {progress.pictures} pictures{_left(now - begun, progress)}"))

        yield show


def _left(elapsed: float, progress: batch.Progress) -> str:
    seconds = elapsed / progress.steps * (progress.of_steps - progress.steps) if progress.steps else 0.0
    if not seconds:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
