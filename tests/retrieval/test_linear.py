"""The encoder in closed form: its formulas against brute force, what its vectors do not depend on, what it learns and does not, and its files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from composition import Refused
from composition.loras.kinds.lora import Factors
from retrieval import linear, metrics, ridge
from retrieval.linear import LinearEncoder, LinearSettings
from retrieval.sketch import sketched
from retrieval.training import Lessons
from tests.retrieval.pool import HIDDEN, SHAPES, TEXT, Pool
from tests.retrieval.test_encode import changed

CONCEPTS = 60
LAYERS = list(SHAPES)


def dense(lora, layer):
    return lora[layer].up.double() @ lora[layer].down.double()


def made(loras, lessons, reads="factors", **changes) -> LinearEncoder:
    items = [sketched(lora) for lora in loras] if reads == "sketches" else loras
    centre = torch.zeros(TEXT)
    settings = LinearSettings(SHAPES, "toy", "sd", "toy", len(loras), reads)
    return LinearEncoder.of(ridge.fit(items, lessons, LAYERS, centre, **changes), settings, centre)


class Taught:
    """Two LoRAs of each concept; held out are new concepts, half-way between two of those, with a LoRA each in another basis."""

    def __init__(self) -> None:
        self.pool = Pool()
        concepts = self.pool.normal(CONCEPTS, HIDDEN)
        self.loras = [self.pool.lora(concept) for concept in concepts for _ in range(2)]
        groups = torch.arange(CONCEPTS).repeat_interleave(2)
        captions = torch.stack([self.pool.caption(concept) for concept in concepts for _ in range(3)])
        directions = torch.stack([self.pool.caption(concept) for concept in concepts for _ in range(2)])
        self.lessons = Lessons(groups, captions, torch.arange(CONCEPTS).repeat_interleave(3), directions)
        held_out = (concepts[: CONCEPTS // 2] + concepts[CONCEPTS // 2 :]) / 2**0.5
        self.unseen = [self.pool.lora(concept) for concept in held_out]
        self.queries = torch.stack([self.pool.caption(concept) for concept in held_out])

    def recall(self, encoder) -> float:
        unseen = [sketched(lora) for lora in self.unseen] if encoder.settings.reads == "sketches" else self.unseen
        scores = (encoder.read(self.queries) @ encoder.encode(unseen).T).numpy()
        return metrics.evaluate(scores, np.eye(len(scores), dtype=bool), np.arange(len(scores)))["R@1"].mean


@pytest.fixture(scope="module")
def toy():
    return Taught()


@pytest.fixture(scope="module")
def encoder(toy):
    return made(toy.loras, toy.lessons)


@pytest.mark.parametrize("reads", ["factors", "sketches"])
@pytest.mark.parametrize("teacher", ["captions", "directions", "both"])
def test_unseen_mixtures_are_found_by_their_captions(toy, teacher, reads):
    """Chance is 1 in 30."""
    lessons = {"both": toy.lessons, "captions": replace(toy.lessons, directions=None),
               "directions": replace(toy.lessons, captions=torch.zeros(0, TEXT), of=torch.zeros(0).long())}[teacher]  # fmt: skip
    assert toy.recall(made(toy.loras, lessons, reads)) > 0.5


def test_labels_that_say_nothing_teach_nothing(toy):
    order = torch.randperm(CONCEPTS, generator=torch.Generator().manual_seed(5))
    assert toy.recall(made(toy.loras, replace(toy.lessons, groups=order[toy.lessons.groups], directions=None))) < 0.25


def test_products_are_those_of_the_updates(toy):
    loras = [*toy.loras[:4], {name: part for name, part in toy.loras[4].items() if name != LAYERS[0]},
             toy.pool.lora(torch.ones(HIDDEN), extra=5)]  # fmt: skip
    for layer in LAYERS[:2]:
        updates = [dense(lora, layer).flatten() if layer in lora else torch.zeros(320, dtype=torch.float64) for lora in loras]
        expected = torch.tensor([[float(a @ b) for b in updates] for a in updates], dtype=torch.float64)
        torch.testing.assert_close(ridge.products(loras, layer), expected, rtol=1e-5, atol=1e-4)
        sketches = [sketched(lora) for lora in loras]
        expected = torch.tensor([[(a.matrices([layer]) * b.matrices([layer])).sum().item() for b in sketches] for a in sketches], dtype=torch.float64)
        torch.testing.assert_close(ridge.products([ridge.opened(each) for each in sketches], layer), expected)


def test_left_out_is_the_regression_without_that_row():
    rng = torch.Generator().manual_seed(0)
    features, wanted = torch.randn(12, 30, generator=rng, dtype=torch.float64), torch.randn(12, 3, generator=rng, dtype=torch.float64)
    kernel = features @ features.T / 30
    for row in range(12):
        rest = [index for index in range(12) if index != row]
        inner = kernel[rest][:, rest] + 0.2 * torch.eye(11, dtype=torch.float64)
        expected = kernel[row, rest] @ torch.linalg.solve(inner, wanted[rest])
        torch.testing.assert_close(ridge.left_out(kernel, wanted, 0.2)[row], expected)


def test_the_map_is_kernel_ridge_regression(toy, monkeypatch):
    """With readings that leave nothing out: k(x, .) (K + ridge I)^-1 Y of the exact products, weighted by layer."""
    monkeypatch.setattr(ridge, "HEAVY", (64, 64))
    monkeypatch.setattr(ridge, "LIGHT", (64, 64))
    fit = ridge.fit(toy.loras, toy.lessons, LAYERS, torch.zeros(TEXT))
    everything = [*toy.loras, *toy.unseen]
    total = sum(weight * ridge.products(everything, layer) for layer, weight in fit.weights.items())
    norms = total.diagonal().sqrt()
    cosines, n = total / norms[:, None] / norms, len(toy.loras)
    wanted = ridge.targets(toy.lessons, torch.zeros(TEXT)) @ fit.axes.T
    expected = cosines[n:, :n] @ torch.linalg.solve(cosines[:n, :n] + fit.ridge * torch.eye(n, dtype=torch.float64), wanted)
    made_of = LinearEncoder.of(fit, LinearSettings(SHAPES, "toy", "sd", "toy", n), torch.zeros(TEXT))
    torch.testing.assert_close(made_of.encode(toy.unseen).double(), F.normalize(expected @ fit.axes, dim=-1), rtol=1e-3, atol=1e-3)


def test_layers_that_tell_something_are_heeded():
    """One layer follows the concept, the others are noise."""
    pool, rng = Pool(3), torch.Generator().manual_seed(1)
    concepts = pool.normal(80, HIDDEN)
    telling = LAYERS[2]
    loras = []
    for concept in concepts:
        lora = pool.lora(concept, noise=0.1)
        loras.append({name: part if name == telling else Factors(torch.randn(3, 16, generator=rng), torch.randn(20, 3, generator=rng) * 3, None)
                      for name, part in lora.items()})  # fmt: skip
    lessons = Lessons(torch.arange(80), torch.stack([pool.caption(concept) for concept in concepts]), torch.arange(80))
    weights = ridge.fit(loras, lessons, LAYERS, torch.zeros(TEXT)).weights
    assert max(weights, key=weights.__getitem__) == telling and weights[telling] > 3 * sorted(weights.values())[-2]


@pytest.mark.parametrize("change", ["basis", "padding", "alpha", "weight", "order", "unknown layer"])
def test_a_vector_depends_on_what_the_updates_are(encoder, change):
    lora = Pool(7, dtype=torch.float64).lora(torch.ones(HIDDEN, dtype=torch.float64))
    again = changed(lora, change)
    assert set(again) != set() and (change == "order" or any(not torch.equal(again[name].up, lora[name].up) or not torch.equal(again[name].down, lora[name].down)
                                                             for name in lora) or change == "unknown layer")  # fmt: skip
    torch.testing.assert_close(encoder.encode([again]), encoder.encode([lora]), atol=1e-6, rtol=1e-5)


def test_half_precision_hardly_matters(encoder, toy):
    half = {name: Factors(part.stored_down.half(), part.stored_up.half(), part.alpha) for name, part in toy.unseen[0].items()}
    assert F.cosine_similarity(encoder.encode([half]), encoder.encode(toy.unseen[:1])).item() > 0.9999


def test_what_layers_say_adds_up_so_that_any_may_be_missing(encoder, toy):
    first = {name: part for number, (name, part) in enumerate(toy.unseen[0].items()) if number % 2}
    other = {name: part for name, part in toy.unseen[0].items() if name not in first}
    parts, whole = encoder.encode([first, other]), encoder.encode(toy.unseen[:1])[0]
    plane = torch.linalg.lstsq(parts.T, whole[:, None]).solution
    torch.testing.assert_close(parts.T @ plane, whole[:, None], atol=1e-4, rtol=1e-4)
    assert (plane > 0).all()


def test_a_lora_of_another_base_is_not_known(encoder, toy):
    lora = toy.unseen[0]
    wide = {name: Factors(F.pad(part.down, (0, 1)), part.up, None) for name, part in lora.items()}
    other = {name.replace("unet", "transformer"): part for name, part in lora.items()}
    silent = {name: Factors(part.down, 0 * part.up, None) for name, part in lora.items()}
    assert encoder.knows(lora) and not encoder.knows(wide) and not encoder.knows(other) and not encoder.knows(silent)
    for strange in (wide, other, silent):
        with pytest.raises(Refused, match="no layer that this encoder knows"):
            encoder.encode([strange])
    assert encoder.encode([]).shape == (0, TEXT)


def test_sketches_know_and_are_known(toy):
    encoder = made(toy.loras, toy.lessons, "sketches")
    read = sketched(toy.unseen[0])
    assert encoder.knows(read) and not encoder.knows(read.shrunk(8))
    wide = sketched({name: Factors(F.pad(part.down, (0, 1)), part.up, None) for name, part in toy.unseen[0].items()})
    assert not encoder.knows(wide)
    with pytest.raises(Refused, match="no layer that this encoder knows"):
        encoder.encode([wide])
    with pytest.raises(ValueError, match="cannot become"):
        encoder.encode([read.shrunk(8)])


def test_nothing_to_learn_from_is_refused(toy):
    empty = Lessons(torch.arange(2), torch.zeros(0, TEXT), torch.zeros(0).long(), torch.zeros(2, TEXT))
    with pytest.raises(Refused, match="needs at least 2"):
        ridge.fit(toy.loras[:2], empty, LAYERS, torch.zeros(TEXT))


def test_the_same_lessons_make_the_same_file(toy, tmp_path):
    for name in "ab":
        made(toy.loras, toy.lessons).save(tmp_path / name)
    first, other = (LinearEncoder.open(tmp_path / name) for name in "ab")
    assert first.name == other.name and first.name.startswith("toy ") and len(first.name) == 16
    vectors = first.encode(toy.unseen)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-5)
    assert F.cosine_similarity(vectors, made(toy.loras, toy.lessons).encode(toy.unseen)).min() > 0.9999, "half precision"


@pytest.mark.parametrize("damage", ["no settings", "words", "layers", "base", "shapes", "a part missing", "a part too many", "side", "version", "cut"])
def test_damaged_files_are_refused(encoder, toy, tmp_path, damage):
    encoder = made(toy.loras, toy.lessons, "sketches") if damage == "version" else encoder
    encoder.save(tmp_path)
    settings, weights = tmp_path / linear.SETTINGS, tmp_path / linear.WEIGHTS
    words = json.loads(settings.read_text())
    if damage == "no settings":
        settings.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage in ("a part missing", "a part too many"):
        from safetensors.torch import load_file, save_file

        parts = load_file(weights)
        if damage == "a part missing":
            del parts["map.0"]
        else:
            parts["more"] = torch.ones(2)
        save_file(parts, weights)
    else:
        words |= {"words": {"extra": 1}, "layers": {"layers": []}, "base": {"base": 3}, "shapes": {"layers": words["layers"] | {LAYERS[0]: [21, 16]}},
                  "side": {"side": 0}, "version": {"sketch_version": 99}}[damage]  # fmt: skip
        settings.write_text(json.dumps(words))
    with pytest.raises(Refused):
        LinearEncoder.open(tmp_path)
