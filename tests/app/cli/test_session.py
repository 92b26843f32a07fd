"""One progress bar over all runs, and what stops them."""

import io
import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from rich.console import Console

from app import workbench
from app.cli import session
from composition import Cancelled, Refused, Request


class Engine:
    """Answers any request with `events` progress events, doing `at` to the process on the way."""

    def __init__(self, result, events, at=None):
        self.result, self.events, self.at = result, events, at or (lambda index: None)

    def group(self):
        return nullcontext()

    def run(self, request, on_step, cancel):
        if request.method == "switch":
            raise Refused("not that one")
        for index in range(1, self.events + 1):
            self.at(index)
            on_step(SimpleNamespace(index=index, count=self.events))
        return self.result


def _console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def test_the_bar_runs_to_the_end_whatever_the_sampler_counts(result):
    console = _console(True)
    with workbench.bench(Engine(result, events=6), 10, console) as at:
        at.run(Request(prompt="a", steps=5), "one")
        half = at._progress.tasks[0].completed
        at.run(Request(prompt="a", steps=5), "two")
        assert (half, at._progress.tasks[0].completed) == (5, 10)
        at._progress.refresh()
    assert "100%" in console.file.getvalue()


def test_no_bar_where_nobody_looks(result):
    console = _console(False)
    with workbench.bench(Engine(result, events=3), 5, console) as at:
        at.run(Request(prompt="a", steps=5), "one")
    assert console.file.getvalue() == ""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_stops_after_this_run_and_twice_at_once(result):
    before = signal.getsignal(signal.SIGINT)
    once = Engine(result, 3, lambda index: os.kill(os.getpid(), signal.SIGINT) if index == 3 else None)
    with pytest.raises(Cancelled), workbench.bench(once, 5, _console(False)) as at:
        at.run(Request(prompt="a", steps=5), "one")
    twice = Engine(result, 3, lambda index: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), workbench.bench(twice, 5, _console(False)) as at:
        at.run(Request(prompt="a", steps=5), "one")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_method_that_refuses_is_left_out_and_says_why(result, tmp_path, monkeypatch):
    monkeypatch.setattr(workbench.Workbench, "save", lambda self, result, folder, stem: session.record.save(result, folder, stem))
    with workbench.bench(Engine(result, 2), 15, _console(False)) as at:
        tiles, sheet = session.compare(at, Request(prompt="a", steps=5), {"merge": {}, "switch": {}}, tmp_path, "x")
        assert [tile.title for tile in tiles] == ["Prompt only", "Merge", "Switch"]
        assert [tile.refused for tile in tiles] == ["", "", "not that one"]
        assert sheet.exists()
        with pytest.raises(Refused, match="not that one"):
            session.compare(at, Request(prompt="a", steps=5), {"switch": {}}, tmp_path, "x")


def test_the_stand_in_says_what_the_engine_says():
    from composition.engine import Event

    assert {"index", "count"} <= set(Event._fields)
