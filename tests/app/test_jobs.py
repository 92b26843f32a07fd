"""Jobs in line: order, cancelling, failing, forgetting; and previews that stay cheap."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from app.cost import Meter
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


def test_clients_take_turns(slow, jobs):
    """Ten of one client, three of another, one of a third that comes late: nobody waits for the whole of another's."""
    first = jobs.submit(Request(prompt="a0", steps=1), "a")
    assert slow.at.wait(PATIENCE)
    rest = [jobs.submit(Request(prompt=f"a{k}", steps=1), "a") for k in range(1, 7)]
    rest += [jobs.submit(Request(prompt=f"b{k}", steps=1), "b") for k in range(3)]
    late = jobs.submit(Request(prompt="c0", steps=1), "c")
    assert [jobs.before(job) for job in (first, rest[0], late, rest[6])] == [0, 3, 2, 1]
    slow.go.release(11)
    wait(first, late, *rest)
    assert slow.made == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3", "a4", "a5", "a6"]


def test_one_client_does_not_fill_the_line(slow):
    with Jobs(slow, lambda result: "", room=6, each=3) as jobs:
        jobs.submit(Request(prompt="a"), "a")
        assert slow.at.wait(PATIENCE)
        for _ in range(3):
            jobs.submit(Request(prompt="a"), "a")
        with pytest.raises(Refused, match="3 pictures of yours"):
            jobs.submit(Request(prompt="a"), "a")
        jobs.submit(Request(prompt="b"), "b")
        slow.go.release(1)


# cost --------------------------------------------------------------------------------------------------------------------


class Priced(Slow):
    """A machine on which a step at 64 x 64 takes `step` seconds, whatever is waited for: its clock is moved."""

    def __init__(self, monkeypatch, step):
        super().__init__()
        self.name, self.now = "pocket", 100.0
        self.backbone.size = lambda request: request.size or (64, 64)
        self.backbone.defaults = (25, 5.0)
        self.backbone.embedded_guidance = lambda request: None
        monkeypatch.setattr("app.jobs.time.perf_counter", lambda: self.now)
        self.step = step

    def run(self, request, on_step=None, cancel=None):
        def later(event):
            self.now += self.step
            on_step(event)

        return super().run(request, later, cancel)


def test_what_would_take_too_long_is_refused_with_the_estimate(monkeypatch):
    priced = Priced(monkeypatch, 0.02)
    priced.go.release(10_000)
    with Jobs(priced, lambda result: "", meter=Meter(600)) as jobs:
        wait(jobs.submit(Request(prompt="a", steps=2)))  # by now the steps before the first job were measured
        with pytest.raises(Refused, match=r"25 steps of 1 evaluations at 4096x4096 would take about .* hours on this machine.*10 minutes.*smaller"):
            jobs.submit(Request(prompt="a", size=(4096, 4096)))
        with pytest.raises(Refused, match="1000 steps of 64 evaluations"):
            jobs.submit(Request(prompt="a", steps=1000, method="composite", loras=[Lora(f"l{k}") for k in range(64)], size=(128, 128)))
        wait(jobs.submit(Request(prompt="a", size=(128, 128), method="composite", loras=[Lora("x"), Lora("y")])))


def test_an_estimate_that_was_wrong_is_stopped_at_the_limit(monkeypatch):
    priced = Priced(monkeypatch, 0.001)
    priced.go.release(10_000)
    with Jobs(priced, lambda result: "", meter=Meter(60)) as jobs:
        wait(jobs.submit(Request(prompt="a", steps=2)))
        priced.step = 9.0
        slow, after = jobs.submit(Request(prompt="slow", steps=100)), None
        wait(slow)
        assert slow.state == "failed" and "stopped at step 7 of 100: a picture may take 60 s" in slow.error
        priced.step = 0.001
        after = jobs.submit(Request(prompt="after", steps=2))
        wait(after)
        assert after.state == "done"


def test_the_estimate_follows_steps_evaluations_and_pixels():
    meter = Meter()
    assert meter.estimate(10, 1, 4096) is None
    meter.learn(4096, 2.0, [5.0, 7.0, 9.0])
    assert meter.estimate(10, 3, 4096) == pytest.approx(30)
    assert meter.estimate(10, 3, 1024) == pytest.approx(30 / 4)
    assert 30 * 16 < meter.estimate(10, 3, 16 * 4096) < 30 * 256
    meter.learn(16 * 4096, 1.0, [0.0, 9.0])
    assert meter.estimate(1, 1, 16 * 4096) == pytest.approx(9)
    meter.learn(64, 1.0, [3.0])  # one step alone tells nothing
    assert meter.estimate(1, 1, 64) == pytest.approx(1 / 64)


def test_4096_by_4096_is_refused_at_the_speed_of_this_machine(tmp_path):
    with Engine.open("pocket", device="cpu") as engine, Jobs(engine, lambda result: tmp_path / "a.png", meter=Meter()) as jobs:
        wait(jobs.submit(Request("a fox", steps=2)))
        with pytest.raises(Refused, match="4096x4096 would take about"):
            jobs.submit(Request("a fox", size=(4096, 4096)))


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
        request = Request("an owl on the moon", loras=[Lora("owl"), Lora("moon", 0.5)], steps=4, seed=3, size=(64, 64))
        alone = engine.run(request).images[0]
        moved = threading.Event()
        with Jobs(engine, lambda result: "") as jobs:
            a = jobs.submit(Request("a raccoon", loras=[Lora("raccoon")], method="composite", steps=1000, size=(64, 64)))
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
    asked = Request("a fox and a raccoon on the moon", loras=[Lora("raccoon"), Lora("moon")], method="cmlora", steps=4, size=(64, 64))
    with Engine.open("pocket", device="cpu") as engine, Jobs(engine, lambda result: tmp_path / "a.png") as jobs:
        job = jobs.submit(asked)
        wait(job)
        assert job.state == "done", job.error
        order = job.result.request.options["order"].split(",")
        assert sorted(order) == ["moon", "raccoon"] and "order by measured change" in job.result.notes["order"]
        told = report(job.result, job.path, str)
        timeline = told.partition('<pre class="timeline"')[2].partition("</pre>")[0].splitlines()
        assert {line.split()[0] for line in timeline[1:]} == {"phase", *order} and job.result.notes["order"] in told
        plain = jobs.submit(Request("a fox", method="merge", steps=1))
        wait(plain)
        assert "<pre" not in report(plain.result, plain.path, str) and "order" not in plain.result.notes
