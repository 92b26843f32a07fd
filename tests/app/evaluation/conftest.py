"""A testbed of the toy's three LoRAs, as ComposLoRA writes one."""

import json

import pytest


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
