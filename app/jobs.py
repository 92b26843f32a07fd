"""Jobs: requests in line for one engine, made one after another by one thread; each can be stopped without harm to the rest.

The line is fair: of several clients each has a turn, whoever asked for more. (Each job has a round, the one after its client's last;
jobs run by round, in a round by number: start-time fair queueing with jobs of one size.)
"""

import os
import threading
import time
import traceback
from bisect import insort
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from app.cost import Meter, spoken
from app.errors import sentence
from app.preview import Preview
from composition import Cancelled, Refused, Request, Result
from composition.request import STARTED_NOTE

if TYPE_CHECKING:
    from composition import Engine, Event

State = Literal["waiting", "running", "done", "cancelled", "failed"]


class Job:
    """One request on its way. The worker writes it, anyone may read it.

    client: who asked for it. turn: (its round, its number), by which it runs. number: its name among the jobs. step of steps: how far it is (steps 0 until the first one is done). preview: the
    latest picture of the work. stop: set to stop it before its next evaluation. result and path: when done. error: when
    failed, a sentence. finished: set at the end, whatever it was.
    """

    def __init__(self, number: int, request: Request, client: str = "", turn: int = 0) -> None:
        self.number, self.client, self.turn = number, client, (turn, number)
        self.request = request
        self.state: State = "waiting"
        self.step = self.steps = 0
        self.preview: Image.Image | None = None
        self.result: Result | None = None
        self.path: Path | None = None
        self.error = ""
        self.stop = threading.Event()
        self.finished = threading.Event()
        self._begun = self._ended = 0.0

    @property
    def seconds(self) -> float:
        """How long it has been running, 0 while it waits."""
        if not self._begun:
            return 0.0
        return (self._ended or time.perf_counter()) - self._begun

    def begin(self) -> None:
        self._begun = time.perf_counter()
        self.state = "running"

    def end(self, state: State, error: str = "") -> None:
        self._ended = time.perf_counter()
        self.state, self.error = state, error
        self.finished.set()


class Jobs:
    """The line of one engine. Use it as a context manager: at its end everything is cancelled and the thread joined.

    keep: writes a result to disk and answers where; called by the worker, so that a picture is kept whoever still looks.
    room: how many may wait; each: how many of one client. meter: what pictures cost here; with one, what would take too long is refused,
    and what does all the same is stopped; before the first job it is shown what a step takes. A job is forgotten when it ends: who submitted it holds the only reference.
    """

    def __init__(self, engine: "Engine", keep: Callable[[Result], Path], *, room: int = 64, each: int = 8, meter: Meter | None = None) -> None:
        self._engine, self._keep, self._room, self._each, self._meter = engine, keep, room, each, meter
        self._preview = Preview(engine.backbone.decode) if _may_preview(engine) else None
        self._changed = threading.Condition()
        self._waiting: list[Job] = []  # in the order in which they will run
        self._running: Job | None = None
        self._count = self._round = 0
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="medley-jobs", daemon=True)
        self._worker.start()

    def submit(self, request: Request, client: str = "") -> Job:
        """Put a request in line. Raises Refused when the line is full or closed, this client's part of it too, or it would cost too much."""
        if self._meter is not None:
            self._meter.check(request, self._engine)
        with self._changed:
            if self._closed:
                raise Refused("Medley is closing; start it again to make pictures")
            if len(self._waiting) >= self._room:
                raise Refused(f"{self._room} pictures are waiting already: wait for some of them, or cancel them")
            mine = [job for job in self._waiting if job.client == client]
            if len(mine) >= self._each:
                raise Refused(f"{self._each} pictures of yours are waiting already: wait for some of them, or cancel them")
            mine += [self._running] if self._running is not None and self._running.client == client else []
            self._count += 1
            job = Job(self._count, request, client, max([self._round, *(1 + other.turn[0] for other in mine)]))
            insort(self._waiting, job, key=lambda job: job.turn)
            self._changed.notify_all()
            return job

    def seconds(self, steps: int, evaluations: float, pixels: int) -> float | None:
        """About how long such a picture takes here once its turn comes; None where nothing was measured yet."""
        return self._meter.estimate(steps, evaluations, pixels) if self._meter is not None else None

    def cancel(self, number: int) -> None:
        """Stop the job of this number: at once when it waits, before its next evaluation when it runs. Else nothing."""
        with self._changed:
            if waiting := next((job for job in self._waiting if job.number == number), None):
                self._leave(waiting)
            elif self._running is not None and self._running.number == number:
                self._running.stop.set()

    def before(self, job: Job) -> int:
        """How many jobs are made before this one."""
        with self._changed:
            ahead = self._running is not None and self._running is not job
            return self._waiting.index(job) + ahead if job in self._waiting else 0

    def close(self) -> None:
        """Cancel every job and wait for the worker to end."""
        with self._changed:
            self._closed = True
            for job in tuple(self._waiting):
                self._leave(job)
            if self._running is not None:
                self._running.stop.set()
            self._changed.notify_all()
        self._worker.join()

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _leave(self, job: Job) -> None:
        self._waiting.remove(job)
        job.stop.set()
        job.end("cancelled")

    def _work(self) -> None:
        if self._meter is not None:
            self._try_out()
        while self._next():
            pass

    def _try_out(self) -> None:
        """Three steps of the model's own size for the meter, so that the first picture is estimated too; whatever goes wrong with them."""
        stop = threading.Event()
        times: list[float] = []

        def tick(_: object) -> None:
            times.append(time.perf_counter())
            if self._closed:
                stop.set()

        request = Request(prompt="", model=self._engine.name, steps=3)
        with suppress(Exception):
            self._engine.run(request, on_step=tick, cancel=stop)
        self._learn(request, 1.0, times)

    def _learn(self, request: Request, evaluations: float, times: list[float]) -> None:
        """evaluations: of each step. times: when each ended."""
        if self._meter is not None:
            width, height = self._engine.backbone.size(request)
            self._meter.learn(width * height, evaluations, times)

    def _next(self) -> bool:
        """Make the next job; False when there will be none. A call of its own, so that no local outlives the job."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return False
            job = self._running = self._waiting.pop(0)
            self._round = job.turn[0]
            job.begin()
        state, error = self._make(job)
        with self._changed:
            self._running = None
        job.end(state, error)
        return True

    def _make(self, job: Job) -> tuple[State, str]:
        times: list[float] = []
        late = ""

        def tell(event: "Event") -> None:
            nonlocal late
            times.append(time.perf_counter())
            job.step, job.steps = event.index, event.count
            if self._meter is not None and job.seconds > self._meter.longest and event.index < event.count:
                late = f"stopped at step {event.index} of {event.count}: a picture may take {spoken(self._meter.longest)}"
                job.stop.set()
            if self._preview is not None and (picture := self._preview.of(event)) is not None:
                job.preview = picture

        try:
            if self._meter is not None:
                self._meter.check(job.request, self._engine)  # by what was measured while it waited
            if self._preview is not None:
                self._preview.begin()
            result = self._engine.run(job.request, on_step=tell, cancel=job.stop)
            if job.stop.is_set():  # cancelled after the last evaluation
                return "cancelled", ""
            if result.request.hires is None:  # whose steps are of two sizes
                ran = result.notes.get(STARTED_NOTE, {}).get("steps", result.request.length)
                self._learn(result.request, result.notes.get("evaluations", 0) / ran, times)
            job.path, job.result = self._keep(result), result
        except Cancelled:
            return ("failed", late) if late else ("cancelled", "")
        except Exception as error:  # whatever it is, the next job must run
            if os.environ.get("MEDLEY_DEBUG"):
                traceback.print_exc()
            return "failed", sentence(error)
        return "done", ""


def _may_preview(engine: "Engine") -> bool:
    """False where decoding would push the denoiser off the device at every look."""
    placement = engine.backbone.placement
    return placement is None or placement.offload != "model"
