"""A log is readable after any stop: torn lines are ended, skipped and counted, short writes are seen."""

import json
import os
import threading

import pytest

from composition import log as logs
from composition.log import Log


def test_rows_are_read_back_in_order(tmp_path):
    log = Log(tmp_path / "a.jsonl")
    assert log.rows() == [] and list(log.newest()) == []
    rows = [{"n": n, "text": "a\nb\u2028ä"} for n in range(5)]
    for row in rows:
        log.append(row)
    assert Log(log.path).rows() == rows and list(log.newest()) == rows[::-1] and log.damaged == 0
    assert [json.loads(line) for line in log.path.read_text("utf-8").split("\n")[:-1]] == rows  # one object a line


@pytest.mark.parametrize("torn", [b'{"n": 1', b'{"n": "\xc3', b"[1]\n", b"\xff\xfe\n", b"{}x", b"[" * 100_000])
def test_a_torn_line_costs_itself_alone(tmp_path, torn):
    log = Log(tmp_path / "a.jsonl")
    log.append({"n": 0})
    with log.path.open("ab") as file:
        file.write(torn)
    log.append({"n": 2})
    assert log.rows() == [{"n": 0}, {"n": 2}] and log.damaged == 1
    assert list(log.newest()) == [{"n": 2}, {"n": 0}]


def test_a_short_write_is_an_error_and_the_next_line_is_whole(tmp_path, monkeypatch):
    log, write = Log(tmp_path / "a.jsonl"), os.write
    log.append({"n": 0})
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(OSError, match="part of a line"):
        log.append({"n": 1})
    monkeypatch.setattr(os, "write", write)
    log.append({"n": 2})
    assert log.rows() == [{"n": 0}, {"n": 2}] and log.damaged == 1


def test_a_line_is_one_write_and_on_the_disk(tmp_path, monkeypatch):
    happened, write, sync = [], os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda handle, data: (happened.append("write"), write(handle, data))[1])
    monkeypatch.setattr(os, "fsync", lambda handle: (happened.append("fsync"), sync(handle))[1])
    Log(tmp_path / "a.jsonl").append({"text": "x" * 100_000})
    assert happened == ["write", "fsync"]


def test_many_writers_never_mix_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    write = lambda n: [Log(path).append({"n": n, "k": k, "text": "x" * 3000}) for k in range(20)]  # noqa: E731
    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = Log(path)
    assert sorted((row["n"], row["k"]) for row in log.rows()) == [(n, k) for n in range(8) for k in range(20)]
    assert log.damaged == 0


def test_from_the_end_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "BLOCK", 64)
    log = Log(tmp_path / "a.jsonl")
    for n in range(200):
        log.append({"n": n, "text": "x" * (n % 90)})  # lines shorter and longer than a block
    assert [row["n"] for row in log.newest()] == list(range(199, -1, -1))
    with log.path.open("r+b") as file:
        file.write(b"\xff" * 1000)  # whoever reads the beginning sees damage
    newest = log.newest()
    assert [next(newest)["n"] for _ in range(100)] == list(range(199, 99, -1))
