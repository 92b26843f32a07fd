"""Training the encoder: it learns what it should, its loss is the formula's, and stopping it changes nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from composition import Refused
from retrieval import metrics
from retrieval.encode import Settings
from retrieval.probes import updates
from retrieval.sketch import sketched
from retrieval.tokens import layers, tokens
from retrieval.training import Lessons, Plan, contrast, train
from tests.retrieval.pool import HIDDEN, TEXT, Pool

CONCEPTS = 60
PLAN = Plan(steps=120, batch=60, rate=4e-3, warm=10, spread=0.1, drop=0.1)


class Trained:
    """Two LoRAs of each concept to train on; held out are new concepts, half-way between two of those, with a LoRA each in another basis."""

    def __init__(self) -> None:
        self.pool = Pool()
        concepts = self.pool.normal(CONCEPTS, HIDDEN)
        self.loras = [self.pool.lora(concept) for concept in concepts for _ in range(2)]
        sketches = [sketched(lora) for lora in self.loras]
        self.settings = Settings(layers(sketches), "toy", "sd", "toy", TEXT, TEXT, side=8, focus=0, width=32, depth=1, heads=4)
        self.tokens = tokens(sketches, self.settings.layers, 8)
        captions = torch.stack([self.pool.caption(concept) for concept in concepts for _ in range(3)])
        directions = torch.stack([self.pool.caption(concept) for concept in concepts for _ in range(2)])
        groups = torch.arange(CONCEPTS).repeat_interleave(2)
        self.lessons = Lessons(groups, captions, torch.arange(CONCEPTS).repeat_interleave(3), directions)
        held_out = (concepts[: CONCEPTS // 2] + concepts[CONCEPTS // 2 :]) / 2**0.5
        self.unseen = [self.pool.lora(concept) for concept in held_out]
        self.queries = torch.stack([self.pool.caption(concept) for concept in held_out])

    def recall(self, encoder, loras) -> dict[str, metrics.Estimate]:
        scores = (encoder.read(self.queries) @ encoder.encode(loras).T).numpy()
        return metrics.evaluate(scores, np.eye(len(scores), dtype=bool), np.arange(len(scores)))


@pytest.fixture(scope="module")
def toy():
    return Trained()


@pytest.mark.parametrize("teacher", ["captions", "directions"])
def test_unseen_mixtures_are_found_by_their_captions(toy, teacher):
    """Chance is 1 in 30. Directions alone teach it too: queries are then read as the judge has them."""
    lessons = replace(toy.lessons, directions=None) if teacher == "captions" else replace(toy.lessons, captions=torch.zeros(0, TEXT), of=torch.zeros(0).long())
    losses = []
    encoder = train(toy.tokens, lessons, toy.settings, PLAN, on_step=lambda step, parts: losses.append(sum(parts.values())))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    result = toy.recall(encoder, [sketched(lora) for lora in toy.unseen])
    assert result["R@1"].mean > 0.5 and result["R@5"].mean > 0.8, result
    assert not encoder.training and not any(weight.requires_grad for weight in encoder.parameters())


def test_an_encoder_with_probes_learns_too(toy):
    settings = replace(toy.settings, reads="factors")
    encoder = train(updates(toy.loras, settings.layers), toy.lessons, settings, replace(PLAN, steps=80))
    assert toy.recall(encoder, toy.unseen)["R@1"].mean > 0.3


def test_labels_that_say_nothing_teach_nothing(toy):
    """The test above is no accident of its data: with captions dealt at random, unseen LoRAs are found by chance."""
    order = torch.randperm(CONCEPTS, generator=torch.Generator().manual_seed(5))
    lessons = replace(toy.lessons, groups=order[toy.lessons.groups], directions=None)
    encoder = train(toy.tokens, lessons, toy.settings, replace(PLAN, steps=60))
    assert toy.recall(encoder, [sketched(lora) for lora in toy.unseen])["R@1"].mean < 0.25


def test_training_is_the_same_when_it_was_interrupted(toy, tmp_path):
    plan = replace(PLAN, steps=9, batch=16)
    whole = train(toy.tokens, toy.lessons, toy.settings, plan)
    steps: list[int] = []
    file = tmp_path / "run" / "checkpoint.pt"
    for limit in (4, 7, 99):
        part = train(toy.tokens, toy.lessons, toy.settings, plan, checkpoint=file, save_every=2, on_step=lambda step, losses: steps.append(step),
                     stop=lambda limit=limit: bool(steps) and steps[-1] >= limit)  # fmt: skip
        torch.rand(1)
    assert steps == list(range(1, 10))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, part.state_dict()[name]), name
    other = train(toy.tokens, toy.lessons, toy.settings, replace(plan, seed=1))
    assert not torch.equal(other.project, whole.project)


def test_training_leaves_the_generator_of_others_alone(toy):
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    train(toy.tokens, toy.lessons, toy.settings, replace(PLAN, steps=1, batch=8))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("change", ["plan", "captions", "loras", "damaged"])
def test_a_checkpoint_of_another_training_is_refused(toy, tmp_path, change):
    plan, lessons, loras = replace(PLAN, steps=2, batch=8), toy.lessons, toy.tokens
    file = tmp_path / "checkpoint.pt"
    train(loras, lessons, toy.settings, plan, checkpoint=file)
    if change == "plan":
        plan = replace(plan, steps=3)
    elif change == "captions":
        lessons = replace(lessons, captions=lessons.captions + 1)
    elif change == "loras":
        loras = replace(loras, units=-loras.units)
    else:
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(Refused, match="damaged" if change == "damaged" else "another plan"):
        train(loras, lessons, toy.settings, plan, checkpoint=file)


TROUBLE = {
    "groups": (lambda lessons: replace(lessons, groups=lessons.groups[:-1]), "a group for each"),
    "captions": (lambda lessons: replace(lessons, captions=lessons.captions[:, :-1]), "captions of shape"),
    "directions": (lambda lessons: replace(lessons, directions=lessons.directions[1:]), "directions of shape"),
    "nan": (lambda lessons: replace(lessons, captions=lessons.captions * math.nan), "NaN"),
    "nothing": (lambda lessons: replace(lessons, of=lessons.of + 10**6, directions=None), "nothing to learn"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_lessons_that_do_not_fit_are_refused(toy, case):
    change, words = TROUBLE[case]
    with pytest.raises(Refused, match=words):
        train(toy.tokens, change(toy.lessons), toy.settings, PLAN)


def test_a_lora_without_layers_and_a_plan_without_steps_are_refused(toy):
    silent = replace(toy.tokens, present=toy.tokens.present & (torch.arange(len(toy.tokens)) > 0)[:, None])
    with pytest.raises(Refused, match="without any layer"):
        train(silent, toy.lessons, toy.settings, PLAN)
    for changes in ({"steps": 0}, {"batch": 1}, {"drop": 1.0}, {"rate": 0.0}):
        with pytest.raises(Refused):
            replace(PLAN, **changes)


def test_the_contrast_is_its_formula():
    """Row by row and column by column: -sum of the targets' shares times log softmax; lines without a target do not count."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(4, 5)), rng.random((4, 5)) * (rng.random((4, 5)) < 0.4)
    targets[2] = 0
    expected = 0.0
    for scores, wanted in ((logits, targets), (logits.T, targets.T)):
        lines = [-sum(w / sum(goal) * (s - math.log(sum(math.exp(x) for x in line))) for s, w in zip(line, goal, strict=True))
                 for line, goal in zip(scores, wanted, strict=True) if sum(goal) > 0]  # fmt: skip
        expected += sum(lines) / len(lines) / 2
    assert contrast(torch.from_numpy(logits), torch.from_numpy(targets)).item() == pytest.approx(expected, rel=1e-12)
    assert contrast(torch.from_numpy(logits), torch.zeros(4, 5).double()).item() == 0.0
    right, wrong = (contrast(torch.eye(4) * 50, goal).item() for goal in (torch.eye(4), torch.eye(4).roll(1, 0)))
    assert right < 1e-3 < 10 < wrong
