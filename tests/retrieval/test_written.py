"""What is written of a LoRA, as texts to learn from."""

from pathlib import Path

import numpy as np
import torch

from retrieval import written
from retrieval.cards import Card, Trigger

OWL = Card(Path("snowy_owl-v2.safetensors"), title="Snowy Owl", tags=("bird", "Owl", "white"), description="A white owl. Trained on\nphotos.",
           triggers=(Trigger("snwyowl", "sidecar"), Trigger("feathers", "training tags"), Trigger("bird", "header")))  # fmt: skip


def test_each_text_stands_once_the_most_telling_first():
    assert written.texts([OWL]) == ("Snowy Owl", "snwyowl", "bird", "Owl", "white", "A white owl", "feathers")
    assert written.texts([OWL, Card(Path("p001.safetensors"))]) == written.texts([OWL]), "a name that tells nothing is no text"
    assert written.texts([Card(Path("x.safetensors"))]) == () and written.caption([Card(Path("x.safetensors"))]) == ""
    assert written.caption([Card(Path("snowy_owl-v2.safetensors"))]) == "snowy owl"
    assert written.caption([OWL]) == "Snowy Owl, snwyowl, bird, Owl, white"


def test_texts_are_bounded():
    card = Card(Path("x.safetensors"), title="word " * 200, triggers=tuple(Trigger(f"w{number}x", "user") for number in range(60)))
    assert len(written.texts([card])) == written.MOST and max(map(len, written.texts([card]))) <= written.LETTERS
    assert len(written.caption([card])) <= written.LETTERS


def test_lessons_leave_out_what_many_share():
    def read(texts):
        return np.stack([np.full(3, len(text)) for text in texts])

    many = [("anime", f"thing {'x' * number}") for number in range(40)]
    lessons = written.lessons(many, read, None)
    assert lessons.of.tolist() == list(range(40)) and lessons.captions[:, 0].tolist() == [6 + number for number in range(40)]
    assert lessons.groups.tolist() == list(range(40)) and lessons.directions is None
    none = written.lessons([("anime",)] * 40, read, np.ones((40, 3)))
    assert none.captions.shape == (0, 3) and none.directions is not None and none.directions.dtype == torch.float32
