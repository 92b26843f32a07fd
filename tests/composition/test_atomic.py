"""Files are there whole or not at all, and the variant that must not overwrite never does."""

import os
import threading
from itertools import count

import pytest

from composition import atomic


@pytest.mark.parametrize("content", ["ä", "ä".encode(), lambda file: file.write("ä".encode())], ids=["text", "bytes", "a function"])
def test_all_kinds_of_content(tmp_path, content):
    assert atomic.write(tmp_path / "a.txt", content) == tmp_path / "a.txt"
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa4"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("where", ["content", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_what_stops_the_writer_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, error):
    (tmp_path / "a.txt").write_text("old")

    def crash(*_):
        raise error

    def half(file):
        file.write(b"ha")
        raise error

    if where != "content":
        monkeypatch.setattr(os, where, crash)
    with pytest.raises(type(error)):
        atomic.write(tmp_path / "a.txt", half if where == "content" else "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (happened.append(("fsync", os.fstat(handle).st_size)), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (happened.append("replace"), rename(*paths)))
    atomic.write(tmp_path / "a.txt", "12345")
    assert happened == [("fsync", 5), "replace"]


def _no_links(*_):
    raise PermissionError("no hard links here")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no hard links"])
def test_a_new_file_never_takes_the_place_of_another(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    (tmp_path / "0.txt").write_text("old")
    assert atomic.write_new((tmp_path / f"{n}.txt" for n in count()), "new").name == "1.txt"
    with pytest.raises(FileExistsError):
        atomic.write_new([tmp_path / "0.txt", tmp_path / "1.txt"], "newer")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0.txt": "old", "1.txt": "new"}


def test_many_writers_get_a_name_each(tmp_path):
    write = lambda n: atomic.write_new((tmp_path / f"{k}.txt" for k in count()), str(n))  # noqa: E731
    threads = [threading.Thread(target=write, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {f"{k}.txt" for k in range(16)}
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(n) for n in range(16)}


def test_only_unfinished_files_are_swept(tmp_path):
    for name in (".0123456789abcdef.png.tmp", ".0123456789abcdef.tmp", ".mine.tmp", "0123456789abcdef.tmp", "a.png"):
        (tmp_path / name).write_text("x")
    atomic.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "0123456789abcdef.tmp", "a.png"]
