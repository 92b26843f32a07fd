"""`medley ui` as a command: its port, its address, Ctrl-C, and what it does not load."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from app.ui import serve


def test_a_taken_port_is_one_line(medley):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        number = one.getsockname()[1]
        said = medley("ui", "--port", number)
        assert said.code == 2
        assert f"port {number} cannot be used" in said.err and said.err.count("\n") == 1
    assert serve.port(number) == number


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_command_says_where_it_serves_and_ctrl_c_ends_it(tmp_path):
    number = serve.port(None)
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "ui", "--port", str(number), "--device", "cpu"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a suite started in the background ignores Ctrl-C, and so would this
    try:
        assert f"http://127.0.0.1:{number}/" in process.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")
    assert not (tmp_path / "pictures").exists()


def test_help_does_not_wait_for_gradio():
    code = "import sys, app.cli; sys.exit(bool({'gradio', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], timeout=60).returncode == 0
