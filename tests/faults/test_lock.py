"""One process at a time in a folder, whatever became of the last one, with and without locks of the operating system."""

import os
import signal
import socket
import subprocess
import sys
import threading
import types

import pytest

from composition import Refused, lock


class _Windows(types.ModuleType):
    """msvcrt as far as it is asked: a byte of a file locked by one handle at a time."""

    LK_NBLCK = 2

    def __init__(self):
        super().__init__("msvcrt")
        self.held = {}

    def locking(self, handle, mode, count):
        assert os.lseek(handle, 0, os.SEEK_CUR) == lock.FAR and (mode, count) == (2, 1)
        key = os.fstat(handle).st_ino
        holder = self.held.get(key)
        if holder not in (None, handle) and _inode(holder) == key:
            raise PermissionError(13, "locked")
        self.held[key] = handle


def _inode(handle):
    try:
        return os.fstat(handle).st_ino
    except OSError:
        return None


@pytest.fixture(params=["flock", "windows", "no locks"])
def system(request, monkeypatch):
    """How the operating system locks: as here, as Windows, or not at all."""
    if request.param != "flock":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", _Windows() if request.param == "windows" else None)
    return request.param


def test_the_second_is_refused_by_the_first_ones_number_and_the_file_goes(tmp_path, system):
    file = tmp_path / ".batch.lock"
    with lock.alone(file, "another batch is at work in x"):
        assert file.read_text().split()[1] == str(os.getpid())
        for _ in range(2):
            with pytest.raises(Refused, match=rf"another batch is at work in x \(process {os.getpid()}\): wait for its end.*{file.name}"), \
                    lock.alone(file, "another batch is at work in x"):
                pytest.fail("two at once")
        assert file.is_file()
    assert list(tmp_path.iterdir()) == []
    with lock.alone(file, "x"):
        pass


def test_an_error_inside_lets_go_of_it(tmp_path, system):
    with pytest.raises(OSError), lock.alone(tmp_path / "l", "x"):
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_killed_process_is_broken(tmp_path, system):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "l").write_text(f"process {dead.pid} on {socket.gethostname()}\n")
    with lock.alone(tmp_path / "l", "x"):
        assert (tmp_path / "l").read_text().split()[1] == str(os.getpid())


def test_without_locks_of_the_system_what_may_live_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_locked", lambda handle: None)
    for words in ("process 4000000 on elsewhere\n", "", "process 1 on " + socket.gethostname(), "nonsense"):
        (tmp_path / "l").write_text(words)
        with pytest.raises(Refused, match=r"delete .*l$"), lock.alone(tmp_path / "l", "x is at work"):
            pytest.fail("two at once")


def test_a_real_process_holds_it_until_it_is_killed(tmp_path):
    code = ("import sys; from pathlib import Path; from composition import lock\n"
            "with lock.alone(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "l")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(Refused, match=rf"\(process {process.pid}\)"), lock.alone(tmp_path / "l", "x"):
        pytest.fail("two at once")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with lock.alone(tmp_path / "l", "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_at_a_time_has_it(tmp_path):
    inside, most, got = [], [], []

    def work():
        for _ in range(200):
            try:
                with lock.alone(tmp_path / "l", "x"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    got.append(1)
            except Refused:
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(got) > 10 and list(tmp_path.iterdir()) == []
