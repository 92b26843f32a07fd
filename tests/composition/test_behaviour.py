"""Behaviours of LoRAs: the paper's figures against plain loops, what is drawn for them, and how they are kept."""

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from composition import Cancelled, Engine, Lora, Refused, Request
from composition.backbones.unet import UNetBackbone
from composition.profiles.behaviour import Behaviour, Probe
from composition.profiles.frequency import Profile
from composition.profiles.store import ProfileStore
from composition.profiling import behaviour as measuring
from tests import toys

PROBE = Probe(("a fox", ""), seeds=2, steps=2)
WIDE = 7


def see(pictures):
    """A stand-in for an encoder: a fixed projection of the pixels, with an offset as CLIP's vectors have."""
    pixels = np.stack([np.asarray(picture, np.float64).ravel() / 255 for picture in pictures])
    return pixels @ np.random.default_rng(0).normal(size=(pixels.shape[1], WIDE)) + 3.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder, pipe = tmp_path_factory.mktemp("library"), toys.sd(dtype=torch.float64)
    toys.lora(pipe, folder / "fox.safetensors", seed=1)
    toys.lora(pipe, folder / "owl.safetensors", seed=2)
    toys.lora(pipe, folder / "nothing.safetensors", seed=3, alpha=0.0)
    return Engine(UNetBackbone(pipe, "sd"), "toy", folders=[folder])


def by_loops(engine, lora, probe):
    """Direction, strength, consistency and spread as the paper writes them, one picture at a time."""
    moved, base = [], []
    for prompt in probe.prompts:
        for seed in range(probe.seeds):
            plain = Request(prompt=prompt, model="toy", steps=probe.steps, seed=seed)
            without, with_it = (see(engine.run(request).images)[0] for request in (plain, replace(plain, loras=[lora])))
            base.append(without / math.sqrt(without @ without))
            moved.append(with_it / math.sqrt(with_it @ with_it) - base[-1])
    cosines = [a @ b / math.sqrt(a @ a) / math.sqrt(b @ b) for i, a in enumerate(moved) for j, b in enumerate(moved) if i != j]
    mean = sum(moved) / len(moved)
    far = [math.dist(a, b) for i, a in enumerate(base) for j, b in enumerate(base) if i != j]
    return mean / math.sqrt(mean @ mean), sum(math.sqrt(d @ d) for d in moved) / len(moved), sum(cosines) / len(cosines), sum(far) / len(far)


def test_it_is_the_papers_figures(engine):
    base = measuring.seen(engine, see, PROBE)
    for name in ("fox", "owl"):
        direction, strength, consistency, spread = by_loops(engine, Lora(name), PROBE)
        measured = measuring.measure(engine, see, Lora(name), PROBE, base=base, judge="plain")
        np.testing.assert_allclose(measured.direction, direction, atol=1e-9)
        assert measured.strength == pytest.approx(strength, abs=1e-9) and measured.consistency == pytest.approx(consistency, abs=1e-9)
        assert measured.spread == pytest.approx(spread, abs=1e-6) and measured.relative == pytest.approx(strength / spread, abs=1e-6)
        assert (measured.model, measured.judge, measured.probe, measured.tensor_sha256) == (
            "toy", "plain", PROBE, engine.inspect(name).tensor_sha256)
    assert measured == measuring.measure(engine, see, Lora("owl"), PROBE, judge="plain")  # draws the base itself


def test_a_lora_that_does_nothing_has_no_direction(engine):
    none = measuring.measure(engine, see, Lora("nothing"), PROBE)
    assert set(none.direction) == {0.0} and none.strength == 0 and none.consistency == 0
    assert measuring.measure(engine, see, Lora("fox", weight=0.0), PROBE).strength == 0


def test_differences_that_agree_and_that_do_not():
    base = np.tile([1.0, 0.0, 0.0], (4, 1))

    def of(*rows):
        vectors = np.array(rows, float)
        return measuring.behaviour(vectors / np.linalg.norm(vectors, axis=1)[:, None], base, name="x", tensor_sha256="a", model="m", judge="j",
                                   probe=Probe(("",), seeds=4))  # fmt: skip

    assert of(*[[1, 1, 0]] * 4).consistency == pytest.approx(1)
    assert of([1, 1, 0], [1, -1, 0], [1, 0, 1], [1, 0, -1]).consistency < 0.5
    half = of([1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0])  # two of four pictures moved: one of six pairs agrees
    assert half.consistency == pytest.approx(1 / 6) and half.spread == 0 and half.relative == 0


def test_progress_is_counted_over_all_and_it_can_be_stopped(engine):
    seen = []
    measuring.measure(engine, see, Lora("fox"), PROBE, on_step=lambda done, of: seen.append((done, of)))
    assert seen == [(step, 16) for step in range(1, 17)]
    base, seen = measuring.seen(engine, see, PROBE), []
    measuring.measure(engine, see, Lora("fox"), PROBE, base=base, on_step=lambda done, of: seen.append((done, of)))
    assert seen == [(step, 8) for step in range(1, 9)]
    event = threading.Event()
    with pytest.raises(Cancelled):
        measuring.measure(engine, see, Lora("fox"), PROBE, on_step=lambda *_: event.set(), cancel=event)


def test_what_cannot_be_measured_is_refused(engine):
    with pytest.raises(ValueError, match="two pictures"):
        Probe(("a fox",), seeds=1)
    with pytest.raises(Refused, match="image encoder"):
        measuring.measure(engine, lambda pictures: np.zeros((len(pictures), 3)), Lora("fox"), PROBE)
    with pytest.raises(Refused, match="image encoder"):
        measuring.measure(engine, lambda pictures: see(pictures)[1:], Lora("fox"), PROBE)
    with pytest.raises(ValueError, match="5 pictures, this probe has 4"):
        measuring.measure(engine, see, Lora("fox"), PROBE, base=np.ones((5, WIDE)))


BEHAVIOUR = Behaviour("fox", "a" * 64, "pocket", "judge 1", PROBE, (0.6, 0.8), 0.5, 0.25, 1.0)


def test_it_is_kept_beside_the_frequency_profile(tmp_path):
    store = ProfileStore(tmp_path)
    profile = Profile("fox", "a" * 64, "pocket", "fox", 4, 1, (0.1,) * 4, (0.2,) * 4, 0.5)
    assert store.keep(BEHAVIOUR) != store.keep(profile)
    assert store.behaviour("a" * 64, "pocket", "judge 1") == BEHAVIOUR and store.frequency("a" * 64, "pocket") == profile
    for other in (("b" * 64, "pocket", "judge 1"), ("a" * 20 + "b" * 44, "pocket", "judge 1"), ("a" * 64, "sd", "judge 1"),
                  ("a" * 64, "pocket", "judge 2")):  # fmt: skip
        assert store.behaviour(*other) is None


@pytest.mark.parametrize("field, value", [("strength", -1), ("consistency", 1.5), ("direction", []), ("direction", [1e999]), ("probe", {"prompts": []}),
                                          ("probe", {"prompts": ["x"], "seeds": 1}), ("spread", "wide"), (None, None)])  # fmt: skip
def test_a_damaged_file_is_refused_by_its_name(tmp_path, field, value):
    store = ProfileStore(tmp_path)
    file = store.keep(BEHAVIOUR)
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {field: value}) if field else "{")
    with pytest.raises(Refused, match=rf"{file.name}.*--behaviour --again"):
        store.behaviour("a" * 64, "pocket", "judge 1")
