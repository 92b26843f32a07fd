"""Training under faults: a full disk, a request to end, an error on the way, two at once. What was learned is saved or plainly not."""

import os
import signal
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file

from app import workbench
from composition import atomic, lock
from composition.training import concept as training
from composition.training import state
from composition.training.concept import Plan
from tests.composition.test_training import concept, learn

PLAN = Plan(rank=2, steps=6, batch=2, warm=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The factors of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    learn([concept("fox")], PLAN, folder)
    return load_file(folder / "fox.safetensors")


def resumed(folder, checkpoint):
    learn([concept("fox")], PLAN, folder, checkpoint=checkpoint)
    return load_file(folder / "fox.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


class Full:
    """os.fsync of a disk that takes nothing while `full`."""

    def __init__(self, monkeypatch):
        self.full, self._sync = False, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, handle):
        if self.full:
            raise OSError(28, "No space left on device")
        self._sync(handle)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), KeyboardInterrupt(), BrokenPipeError()], ids=["device", "Ctrl-C", "pipe"])
def test_whatever_ends_it_between_two_steps_what_was_learned_is_saved(tmp_path, whole, error):
    def on_step(step, losses):
        if step == 4:
            raise error

    with pytest.raises(type(error)):
        learn([concept("fox")], PLAN, tmp_path, checkpoint=tmp_path / "fox.training", on_step=on_step)
    assert state.reached(tmp_path / "fox.training") == 4
    assert equal(resumed(tmp_path, tmp_path / "fox.training"), whole)


def test_an_error_inside_a_step_saves_the_step_before(tmp_path, whole, monkeypatch):
    honest, calls = training.Learning.__call__, []

    def failing(self, batch):
        calls.append(1)
        if len(calls) == 4:
            honest(self, batch)  # gradients are there
            raise RuntimeError("out of memory")
        return honest(self, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="memory"):
        patch.setattr(training.Learning, "__call__", failing)
        learn([concept("fox")], PLAN, tmp_path, checkpoint=tmp_path / "fox.training")
    assert state.reached(tmp_path / "fox.training") == 3
    assert equal(resumed(tmp_path, tmp_path / "fox.training"), whole)


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path, whole, monkeypatch):
    disk = Full(monkeypatch)

    def on_step(step, losses):
        disk.full = step == 4

    with pytest.raises(OSError, match="No space left.*fox.training"):
        learn([concept("fox")], PLAN, tmp_path, checkpoint=tmp_path / "fox.training", save_every=2, on_step=on_step)
    disk.full = False
    assert state.reached(tmp_path / "fox.training") == 2 and [path.name for path in tmp_path.iterdir()] == ["fox.training"]
    assert equal(resumed(tmp_path, tmp_path / "fox.training"), whole)


def test_a_disk_that_is_full_at_the_end_leaves_no_lora_in_part(tmp_path, monkeypatch):
    """The first of two files is written, the second is not: the same command writes both."""
    honest, written = training.write, []

    def write(file, *rest):
        written.append(file)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(file))
        honest(file, *rest)

    both = [concept("fox"), concept("owl", 1)]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(training, "write", write)
        learn(both, PLAN, tmp_path, checkpoint=tmp_path / "both.training")
    assert [path.name for path in tmp_path.iterdir()] == ["both.training"] and state.reached(tmp_path / "both.training") == PLAN.steps
    files = learn(both, PLAN, tmp_path, checkpoint=tmp_path / "both.training")
    learn(both, PLAN, tmp_path / "again")
    assert all(file.read_bytes() == (tmp_path / "again" / file.name).read_bytes() for file in files.values())


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_checkpoint_over_the_limit_of_a_files_size_is_an_oserror_and_leaves_nothing(tmp_path):
    code = ("import resource, sys, torch; from pathlib import Path; from composition import atomic; from composition.training import state\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "try: atomic.write(Path(sys.argv[1]) / 'x.training', lambda part: state.stored({'a': torch.zeros(100_000)}, part))\n"
            "except OSError as error: print('OSError', error.filename)")
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["OSError", str(tmp_path / "x.training")] and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_request_to_end_stops_between_two_steps(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with workbench.stoppable() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    assert signal.getsignal(number) is before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with workbench.stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)


# the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(medley, toy, tmp_path):
    (tmp_path / "zogs").mkdir()
    for index in range(2):
        Image.new("RGB", (40, 40), (200, 90 * index, 10)).save(tmp_path / f"zogs/{index}.png")

    def call(*more):
        return medley("train", "concept", "--images", "zogs", "--trigger", "zog", "--model", toy.model, "--steps", 3, "--batch", 1,
                      "--out", "out", *more)

    return call


def test_a_full_disk_is_said_with_what_is_kept_and_where(train, tmp_path, monkeypatch):
    disk, honest = Full(monkeypatch), training.train

    def filling(*args, on_step, **rest):
        def then(step, losses):
            on_step(step, losses)
            disk.full = step == 3

        return honest(*args, on_step=then, save_every=2, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", filling)
        said = train("--preview-every", 0)
    disk.full = False
    assert said.code == 2 and "No space left on device" in said.err
    assert "learned until step 2 of 3 is in out/zog.training; the same command goes on" in said.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["zog.training"]
    said = train("--preview-every", 0)
    assert said.code == 0 and "going on from step 2" in said.out


def test_that_nothing_could_be_written_is_said(train, tmp_path, monkeypatch):
    disk, honest = Full(monkeypatch), training.train
    monkeypatch.setattr(training, "train", lambda *args, **rest: (setattr(disk, "full", True), honest(*args, **rest))[1])
    said = train("--preview-every", 0)
    assert said.code == 2 and "nothing of the 3 steps could be written" in said.err
    assert list((tmp_path / "out").iterdir()) == []


def test_previews_are_whole_or_not_there_and_cost_no_training(train, tmp_path, monkeypatch):
    (tmp_path / "out/zog-previews").mkdir(parents=True)
    (tmp_path / "out/zog-previews/.0123456789abcdef.png.tmp").write_bytes(b"\x89PNG")
    honest = atomic.write

    def write(target, content):
        if target.name == "00001.png":
            raise OSError(28, "No space left on device", str(target))
        return honest(target, content)

    monkeypatch.setattr(atomic, "write", write)
    said = train("--preview-every", 1, "--steps", 2, "--preview-prompt", "a zog")
    assert said.code == 0, said.err
    assert "no preview of zog at step 1" in said.err and "No space left" in said.err
    assert sorted(path.name for path in (tmp_path / "out/zog-previews").iterdir()) == ["00000.png", "00002.png"]


def test_two_trainings_of_one_name_are_not_at_work_at_once(train, tmp_path):
    (tmp_path / "out").mkdir()
    with lock.alone(tmp_path / "out/.zog.lock", "x"):
        said = train("--preview-every", 0)
    assert said.code == 2 and f"another training of zog is at work in out (process {os.getpid()})" in said.err
    assert train("--preview-every", 0).code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["zog.safetensors"]
