"""What the README and the pages of docs show is run: every python and sh block, in order, in one folder, with the network cut off."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SLOW: set[str] = set()  # first lines of blocks to be marked slow; three at most

NO_NETWORK = '''
import socket


def _local(address):
    return not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")


def _guarded(name):
    original = getattr(socket.socket, name)

    def call(self, address, *rest):
        if not _local(address):
            raise OSError(f"NETWORK TOUCHED: {address}")
        return original(self, address, *rest)

    return call


def _lookup(host, *rest, _original=socket.getaddrinfo, **more):
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        raise OSError(f"NETWORK TOUCHED: {host}")
    return _original(host, *rest, **more)


socket.socket.connect = _guarded("connect")
socket.socket.connect_ex = _guarded("connect_ex")
socket.getaddrinfo = _lookup
'''


class Block(NamedTuple):
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.language}: {self.code.strip().splitlines()[0][:60]}"


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order."""
    return [Block(found[1], found[2]) for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S)]


README = (ROOT / "README.md").read_text("utf-8")
CARDS = [ROOT / "assets/pocket/README.md", ROOT / "assets/pocket128/README.md"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *CARDS]
RUN = [block for page in PAGES if page not in CARDS for block in blocks(page.read_text("utf-8")) if block.language in ("python", "sh", "bash")]


@pytest.fixture(scope="session")
def shell(tmp_path_factory):
    """Runs a command in one folder for all blocks: `medley` and `python` are these sources, `make` is only asked what
    it would do, and no process reaches further than this machine."""
    folder = tmp_path_factory.mktemp("readme")
    tools = folder / "tools"
    tools.mkdir()
    (tools / "sitecustomize.py").write_text(NO_NETWORK)
    for name, line in {
        "medley": f'exec "{sys.executable}" -m app.cli "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        "make": f'exec "{shutil.which("make") or "make"}" --dry-run --directory "{ROOT}" "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    (folder / "work").mkdir()
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{tools}{os.pathsep}{ROOT}",
        "MEDLEY_HOME": str(folder / "home"), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder / "work", env=environment, capture_output=True, text=True, check=False)

    call.folder = folder / "work"  # type: ignore[attr-defined]
    return call


def test_the_network_is_cut_off(shell):
    done = shell("python", "-c", "import socket; socket.create_connection(('192.0.2.1', 80))")
    assert "NETWORK TOUCHED" in done.stderr


@pytest.mark.parametrize("block", [
    pytest.param(block, marks=[pytest.mark.slow] if block.code.splitlines()[0] in SLOW else [], id=block.name) for block in RUN])
def test_block(block, shell):
    command = ("python", "-c", block.code) if block.language == "python" else ("sh", "-eu", "-c", block.code)
    done = shell(*command)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "NETWORK TOUCHED" not in done.stderr + done.stdout


def test_demo(shell):
    """`make demo` ends in `medley demo`, which needs no network, tells what it did, and is quick."""
    planned = shell("make", "demo")
    assert re.search(r"bin/medley demo$", planned.stdout, re.M), planned
    done = shell("medley", "demo", "--out", "demo")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (shell.folder / "demo").glob("*.png"))
    assert names == [f"demo-0000-{way}.png" for way in ("composite", "merge", "prompt", "strip", "switch")]
    for word in ("raccoon: applied", "moon: applied", "neon: applied", "demo-0000-strip.png"):
        assert word in done.stdout


def test_doctor(shell):
    done = shell("medley", "doctor")
    assert done.returncode == 0, done.stdout
    assert "model pocket" in done.stdout


def test_the_readme_shows_what_is_there():
    languages = {block.language for block in blocks(README)}
    assert {"python", "sh"} <= languages
    assert len(SLOW) <= 3
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_every_method_is_in_the_table():
    from composition import methods

    for name in methods.all():
        assert f"| `{name}` |" in README


def test_ci_is_one_command_and_runs():
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", str(run)], check=False).returncode == 0
