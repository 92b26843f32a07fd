"""No command waits for what is no file: a pipe in the place of a picture, a table or a LoRA is refused at once, in plain words."""

import json
import os
import signal

import pytest
from PIL import Image

SECONDS = 20


@pytest.fixture
def place(tmp_path):
    """A folder with a pipe under every ending, and a picture."""
    for name in ("pipe.png", "pipe.jsonl", "pipe.json", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)
    for folder in ("a pipe as picture", "a pipe as caption", "a pipe as table"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "0.png")
    os.mkfifo(tmp_path / "a pipe as picture" / "1.png")
    os.mkfifo(tmp_path / "a pipe as caption" / "0.txt")
    os.mkfifo(tmp_path / "a pipe as table" / "metadata.jsonl")
    (tmp_path / "line.jsonl").write_text(json.dumps({"file_name": "pipe.png", "text": "an owl", "concepts": ["an owl"]}) + "\n")

    def ring(signum, frame):
        raise BaseException("the command waits for a pipe")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


COMMANDS = {
    "--lora": ("generate", "an owl", "--lora", "pipe.safetensors"), "--from": ("generate", "--from", "pipe.png"),
    "a region": ("generate", "an owl", "--lora", '{"source": "owl", "region": "pipe.png"}'), "batch": ("batch", "pipe.jsonl", "--out", "out"),
    "evaluate": ("evaluate", "pipe.jsonl"), "a folder to evaluate": ("evaluate", "a pipe as table"), "a picture to evaluate": ("evaluate", "line.jsonl"),
    "--testbed": ("evaluate", "--testbed", "pipe.json"), "inspect": ("inspect", "pipe.safetensors"),
    "training pictures": ("train", "concept", "--images", "a pipe as picture", "--trigger", "zog"),
    "captions": ("train", "concept", "--images", "a pipe as caption", "--trigger", "zog"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_waits_for_a_pipe(command, medley, toy, place):
    where = () if command == "inspect" else ("--model", toy.model) if command in ("training pictures", "captions") else (
        "--model", toy.model, "--lora-dir", toy.loras)  # fmt: skip
    answer = medley(*COMMANDS[command], *where)
    assert answer.code == 2, answer.err
    words = answer.err + answer.out
    assert "unexpected" not in words and ("pipe" in words or "a pipe as" in words)


def test_a_list_goes_on_behind_a_pipe(medley, toy, place):
    answer = medley("loras", "--lora-dir", toy.loras, "--lora-dir", place)
    assert answer.code == 0 and all(name in answer.out for name in ("pipe", "a pipe or a device", "fox", "owl"))
