"""Tasks take turns, are tried with one setting after the other, and fail alone."""

import time
from functools import partial

import pytest

from assets.recipe import tasks


def trains(folder, name, turn, setting):
    """A task: says when its turn was."""
    if setting == "bad":
        raise ValueError("this setting does not work")
    with (folder / "order").open("a") as said:
        minutes = turn.minutes()
        said.write(f"{name} {setting} {minutes > 0}\n")
        time.sleep(0.2)
    turn.trained()


@pytest.mark.slow
def test_tasks_take_turns_and_fail_alone(tmp_path, capsys):
    task = lambda name, settings=("good",), **more: tasks.Task(name, partial(trains, tmp_path, name), 1, settings, **more)  # noqa: E731
    first, broken, third = task("first"), task("broken", ("bad",)), task("third", ("bad", "good"))
    last = task("last", after=[broken])
    tasks.take_turns([first, broken, third, last], time.time() + 200, tmp_path, threads=1)
    assert [t.done for t in (first, broken, third, last)] == [True, False, True, False]
    assert sorted((tmp_path / "order").read_text().splitlines()) == ["first good True", "third good True"]
    assert "ValueError: this setting does not work" in (tmp_path / "broken.log").read_text()
    assert "last: left out, as broken failed" in capsys.readouterr().out
