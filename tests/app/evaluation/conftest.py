"""A testbed of the toy's three LoRAs, as ComposLoRA writes one, and a judge that stands in."""

import json
import zlib

import pytest
import torch
import torch.nn.functional as F

from retrieval.judge import Judge, Threshold


@pytest.fixture
def bed(tmp_path):
    """A *_lora_info.json: characters fox and owl, style ink."""
    entry = lambda name, words: {"id": name, "name": name.capitalize(), "trigger": words, "url": ""}  # noqa: E731
    file = tmp_path / "toy_lora_info.json"
    file.write_text(json.dumps({"character": [entry("fox", ["foxword", "red fur"]), entry("owl", ["owlword"])],
                                "style": [entry("ink", ["ink drawing"])]}))
    return file


@pytest.fixture
def evaluate(medley, toy, bed):
    """`medley evaluate` on the toy: its testbed, two steps, sets of two."""

    def call(*more: object, source=("--testbed", bed), loras="2"):
        return medley("evaluate", *source, "--model", toy.model, "--lora-dir", toy.loras, "--steps", 2, "--loras", loras,
                      "--resamples", 200, "--references", 1, *more)

    return call


def rows(folder, *left_out):
    """scores.jsonl without the columns named."""
    return [{key: value for key, value in json.loads(line).items() if key not in left_out}
            for line in (folder / "scores.jsonl").read_text().splitlines()]


class Witness:
    """A judge that stands in: a picture and a phrase are directions drawn from their bytes, so that about half of all phrases are present in a
    picture, always the same."""

    name, folder = "witness", None

    def __init__(self, *phrases: str) -> None:
        self.thresholds = {phrase: Threshold(0.0, 1.0, 0.0) for phrase in phrases}

    def see(self, pictures):
        return torch.stack([self._direction(picture.convert("RGB").tobytes()) for picture in pictures])

    def read(self, texts):
        return torch.stack([self._direction(text.encode()) for text in texts])

    def cut(self, texts):
        return [False] * len(texts)

    @staticmethod
    def _direction(data):
        return F.normalize(torch.randn(64, generator=torch.Generator().manual_seed(zlib.crc32(data))), dim=0)


@pytest.fixture
def witness(monkeypatch):
    """The judge of every evaluation in this test knows these phrases."""

    def call(*phrases):
        monkeypatch.setattr(Judge, "open", lambda *_: judge)
        return (judge := Witness(*phrases))

    return call
