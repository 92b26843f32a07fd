"""What a training shows while it lasts: a bar of its steps, strips of previews, and where what was learned is when it ends early."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from app.drawing.strip import strip
from app.errors import sentence
from composition import Refused, atomic, lock

PREVIEWS = 6  # by default, the base's own picture included
LAST = 50  # steps whose losses are averaged for show
READ = 10  # steps whose losses are read together: reading waits for the device


@contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """No other training writes a LoRA of this name there. Raises Refused when one does, or has just done so."""
    with lock.alone(folder / f".{name}.lock", f"another training of {name} is at work in {folder}"):
        if (file := folder / f"{name}.safetensors").exists():  # the other one has just ended
            raise Refused(f"{file} is there already and is not overwritten: choose another --name, or delete it")
        atomic.sweep(folder / f"{name}-previews")
        yield


@contextmanager
def explained(checkpoint: Path, bar: "Bar", err: Console) -> Iterator[None]:
    """When an error ends the training, where what was learned is, or that it is nowhere."""
    from composition.training.state import reached

    try:
        yield
    except BaseException:
        if bar.step:
            with suppress(Refused):  # a checkpoint of somebody else's
                err.print(Text(f"medley: what was learned until step {reached(checkpoint)} of {bar.steps} is in {checkpoint}; the same "
                               "command goes on from there" if checkpoint.is_file() else
                               f"medley: nothing of the {bar.step} steps could be written; the same command begins again"))  # fmt: skip
        raise


@contextmanager
def spared(name: str, step: int, err: Console) -> Iterator[None]:
    """A picture that cannot be drawn or written is said, and costs nothing that was learned."""
    from composition.loop import NotFinite

    try:
        yield
    except (OSError, NotFinite) as error:
        err.print(Text(f"medley: no preview of {name} at step {step}: {sentence(error) if isinstance(error, OSError) else error}"))


def save_strip(folder: Path, name: str, step: int, steps: int, tiles: Sequence[tuple[Image.Image, str, str]]) -> None:
    """Write `folder/STEP.png`: the pictures of this step, each with a label and a second line."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = strip(tiles, f"{name}: step {step} of {steps}" if step else f"{name}: the base before training")
    atomic.write(folder / f"{step:05d}.png", lambda file: picture.save(file, format="PNG"))


@dataclass
class Bar:
    """Step, smoothed loss and time left: a bar on a terminal, a line now and then elsewhere."""

    steps: int
    step: int
    console: Console
    what: str = "learning"
    losses: list[float] = field(default_factory=list)
    unread: list[Mapping[str, float]] = field(default_factory=list)

    def __enter__(self) -> "Bar":
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                   TimeRemainingColumn())  # fmt: skip
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.progress.add_task(self.what, total=self.steps, completed=self.step)
        self.progress.start()
        self.begun, self.first = time.monotonic(), self.step
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, step: int, losses: Mapping[str, float]) -> None:
        self.step = step
        self.unread.append(losses)
        due = step % max(1, self.steps // 10) == 0 or step == self.steps
        if not due and len(self.unread) < READ:
            self.progress.update(self.task, completed=step)
            return
        self.losses = [*self.losses, *(sum(step_losses.values()) / len(step_losses) for step_losses in self.unread if step_losses)][-LAST:]
        self.unread.clear()
        state = f"loss {sum(self.losses) / len(self.losses):.4f}" if self.losses else self.what
        self.progress.update(self.task, completed=step, description=state)
        if not self.console.is_terminal and due:
            left = (time.monotonic() - self.begun) / (step - self.first) * (self.steps - step)
            self.console.print(Text(f"step {step} of {self.steps}, {state}, {_span(left)} left"))


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
