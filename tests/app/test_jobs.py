"""Jobs in line: order, cancelling, failing, forgetting; and previews that stay cheap."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from app.jobs import Job, Jobs
from app.preview import GAP, Preview
from app.ui.job_view import report
from composition import Cancelled, Engine, Lora, Refused, Request, Result

PATIENCE = 60  # seconds until a test gives up


class Slow:
    """An engine whose every step waits for `go`. It answers as Engine.run does, and notes what it made."""

    def __init__(self, offload="none"):
        self.go, self.made, self.at = threading.Semaphore(0), [], threading.Event()
        self.backbone = SimpleNamespace(decode=lambda latents: [Image.new("RGB", (900, 30))],
                                        placement=SimpleNamespace(offload=offload))

    def run(self, request, on_step=None, cancel=None):
        if request.prompt == "wrong":
            raise Refused("not that one")
        if request.prompt == "broken":
            raise RuntimeError("a wire is loose")
        request = request.settled(25, 5.0)
        for index in range(1, request.steps + 1):
            if cancel.is_set():
                raise Cancelled("cancelled")
            self.at.set()
            assert self.go.acquire(timeout=PATIENCE)
            on_step(SimpleNamespace(index=index, count=request.steps, latents=torch.zeros(1)))
        self.made.append(request.prompt)
        return Result((Image.new("RGB", (8, 8)),), request, {}, {}, ())


@pytest.fixture
def slow():
    return Slow()


@pytest.fixture
def jobs(slow):
    with Jobs(slow, lambda result: result.request.prompt) as jobs:
        yield jobs
        slow.go.release(10_000)


def wait(*some: Job) -> None:
    for job in some:
        assert job.finished.wait(PATIENCE)


def test_in_order_one_at_a_time(slow, jobs):
    a, b, c = (jobs.submit(Request(prompt=name, steps=2)) for name in "abc")
    assert slow.at.wait(PATIENCE)
    assert (a.state, b.state, c.state) == ("running", "waiting", "waiting")
    assert [jobs.before(job) for job in (a, b, c)] == [0, 1, 2]
    slow.go.release(6)
    wait(a, b, c)
    assert slow.made == ["a", "b", "c"]
    assert [job.state for job in (a, b, c)] == ["done"] * 3
    assert (a.step, a.steps, a.path, a.result.request.prompt) == (2, 2, "a", "a")
    assert a.seconds > 0


def test_a_waiting_job_leaves_at_once(slow, jobs):
    a, b, c = (jobs.submit(Request(prompt=name, steps=1)) for name in "abc")
    jobs.cancel(b.number)
    assert b.finished.is_set() and b.state == "cancelled"
    assert jobs.before(c) <= 1
    slow.go.release(2)
    wait(a, c)
    assert slow.made == ["a", "c"]


def test_a_running_job_stops_before_its_next_step_and_the_next_runs(slow, jobs):
    a, b = jobs.submit(Request(prompt="a", steps=1000)), jobs.submit(Request(prompt="b", steps=3))
    assert slow.at.wait(PATIENCE)
    jobs.cancel(a.number)
    slow.go.release(1)  # the step it was in
    wait(a)
    assert (a.state, a.step, a.result) == ("cancelled", 1, None)
    slow.go.release(3)
    wait(b)
    assert (b.state, slow.made) == ("done", ["b"])


def test_cancelled_in_the_last_step_is_cancelled(slow):
    kept = []
    with Jobs(slow, kept.append) as jobs:
        a = jobs.submit(Request(prompt="a", steps=1))
        assert slow.at.wait(PATIENCE)
        jobs.cancel(a.number)
        slow.go.release(1)
        wait(a)
    assert a.state == "cancelled" and not kept


def test_cancelling_what_has_ended_or_never_was_does_nothing(slow, jobs):
    a = jobs.submit(Request(prompt="a", steps=1))
    slow.go.release(1)
    wait(a)
    jobs.cancel(a.number)
    jobs.cancel(99)
    assert a.state == "done"


@pytest.mark.parametrize(("prompt", "said"), [("wrong", "not that one"), ("broken", "unexpected RuntimeError: a wire is loose")])
def test_a_failing_job_says_why_and_the_next_runs(slow, jobs, prompt, said):
    a, b = jobs.submit(Request(prompt=prompt)), jobs.submit(Request(prompt="b", steps=1))
    slow.go.release(1)
    wait(a, b)
    assert a.state == "failed" and a.error.startswith(said) and "\n" not in a.error
    assert b.state == "done"


def test_a_picture_that_cannot_be_kept_is_a_failure(slow):
    def keep(result):
        raise PermissionError(13, "Permission denied", "pictures")

    with Jobs(slow, keep) as jobs:
        a = jobs.submit(Request(prompt="a", steps=1))
        slow.go.release(1)
        wait(a)
    assert (a.state, a.error, a.result) == ("failed", "pictures: Permission denied", None)


def test_the_line_has_an_end(slow):
    with Jobs(slow, lambda result: "", room=2) as jobs:
        jobs.submit(Request(prompt="a"))
        assert slow.at.wait(PATIENCE)
        for _ in range(2):
            jobs.submit(Request(prompt="b"))
        with pytest.raises(Refused, match="2 pictures are waiting"):
            jobs.submit(Request(prompt="c"))
        slow.go.release(1)


def test_closing_cancels_all_and_joins_the_thread(slow):
    jobs = Jobs(slow, lambda result: "")
    a, b = jobs.submit(Request(prompt="a")), jobs.submit(Request(prompt="b"))
    assert slow.at.wait(PATIENCE)
    slow.go.release(1)
    jobs.close()
    assert {a.state, b.state} == {"cancelled"}
    assert not jobs._worker.is_alive()
    with pytest.raises(Refused, match="closing"):
        jobs.submit(Request(prompt="c"))
    jobs.close()


def test_a_job_that_has_ended_is_forgotten(slow, jobs):
    ends = []
    for prompt in ("a", "broken", "wrong"):
        job = jobs.submit(Request(prompt=prompt, steps=1))
        if prompt == "a":
            slow.go.release(1)
        wait(job)
        ends.append(weakref.ref(job))
        del job
    last = jobs.submit(Request(prompt="z", steps=1))  # when it runs, the worker has let go of the others
    slow.go.release(1)
    wait(last)
    gc.collect()
    assert [end() for end in ends] == [None] * 3


# previews ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "decode"), [(0.01, 0.001), (0.05, 0.2), (0.5, 0.02), (0.3, 5.0), (0.2, 0.0)])
def test_previews_cost_a_quarter_at_most_and_never_come_last(step, decode):
    """On a made-up clock: at least GAP apart, a quarter of the time once the price is known, none of the last step."""
    now, spent, at = [0.0], [], []

    def work(latents):
        at.append(now[0])
        now[0] += decode
        spent.append(decode)
        return [Image.new("RGB", (600, 3))]

    preview = Preview(work, lambda: now[0])
    for _ in range(2):
        begun, before, count = now[0], len(spent), 400
        preview.begin()
        shown = []
        for index in range(1, count + 1):
            now[0] += step
            shown.append(preview.of(SimpleNamespace(index=index, count=count, latents=torch.zeros(1, 2))))
        assert shown[-1] is None
        assert any(shown)
        assert max(next(filter(None, shown)).size) <= 512
        cost = sum(spent[before:])
        assert cost <= (now[0] - begun) / 4 + (decode if before == 0 else 0) + 1e-9
    assert all(b - a >= GAP - 1e-9 for a, b in zip(at, at[1:], strict=False))


def test_a_job_shows_previews_except_where_looking_moves_the_model(monkeypatch):
    monkeypatch.setattr("app.preview.GAP", 0.0)
    for offload, seen in (("none", True), ("model", False)):
        slow = Slow(offload)
        with Jobs(slow, lambda result: "") as jobs:
            a = jobs.submit(Request(prompt="a", steps=3))
            slow.go.release(3)
            wait(a)
        assert (a.preview is not None) is seen


# the real engine --------------------------------------------------------------------------------------------------------


def test_cancelled_midway_the_next_picture_is_as_if_alone():
    with Engine.open("pocket", device="cpu") as engine:
        request = Request("an owl on the moon", loras=[Lora("owl"), Lora("moon", 0.5)], steps=4, seed=3)
        alone = engine.run(request).images[0]
        moved = threading.Event()
        with Jobs(engine, lambda result: "") as jobs:
            a = jobs.submit(Request("a raccoon", loras=[Lora("raccoon")], method="composite", steps=1000))
            b = jobs.submit(request)
            while not a.step and not a.finished.is_set():
                moved.wait(0.01)
            jobs.cancel(a.number)
            wait(a, b)
        assert a.state == "cancelled" and 0 < a.step < 1000
        assert b.state == "done", b.error
        assert b.result.images[0].tobytes() == alone.tobytes()


def test_the_page_pins_a_measured_order_and_tells_who_led_when(tmp_path):
    """As generate does: the record makes the picture again anywhere."""
    asked = Request("a fox and a raccoon on the moon", loras=[Lora("raccoon"), Lora("moon")], method="cmlora", steps=4)
    with Engine.open("pocket", device="cpu") as engine, Jobs(engine, lambda result: tmp_path / "a.png") as jobs:
        job = jobs.submit(asked)
        wait(job)
        assert job.state == "done", job.error
        order = job.result.request.options["order"].split(",")
        assert sorted(order) == ["moon", "raccoon"] and "order by measured change" in job.result.notes["order"]
        told = report(job.result, job.path)
        timeline = told.partition('<pre class="timeline"')[2].partition("</pre>")[0].splitlines()
        assert {line.split()[0] for line in timeline[1:]} == {"phase", *order} and job.result.notes["order"] in told
        plain = jobs.submit(Request("a fox", method="merge", steps=1))
        wait(plain)
        assert "<pre" not in report(plain.result, plain.path) and "order" not in plain.result.notes
