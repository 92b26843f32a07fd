"""Sessions inside sessions, folds that make way and come back, and repair of what was left. (Ctrl-C anywhere: tests/faults.)"""

import gc
import re

import pytest
import torch

from composition import Engine, Lora, adapters
from composition.adapters import Adapters
from composition.adapters import fold as folding
from composition.adapters.layers import _attached
from composition.backbones.unet import UNetBackbone
from composition.loop import Step
from tests import toys
from tests.composition import laws
from tests.composition.test_adapters import forward

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def pipe():
    return toys.sd(dtype=torch.float64)


@pytest.fixture
def held(pipe):
    backbone = UNetBackbone(pipe, "sd")
    return Adapters(backbone.components, family="sd", block=backbone.block)


@pytest.fixture
def sources(pipe, tmp_path):
    return [(name, Lora(name), toys.lora(pipe, tmp_path / f"{name}.safetensors", seed=seed))
            for seed, name in enumerate(("one", "two", "condition"))]


def weights(pipe):
    return {name: value.clone() for name, value in pipe.unet.named_parameters()}


def same(pipe, before):
    return all(torch.equal(value, before[name]) for name, value in pipe.unet.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True], ids=["live", "folded"])
def test_an_inner_session_is_alone_on_the_base(pipe, held, sources, folded):
    """As it were without the outer one; afterwards the outer one is what it was, to the last bit of weights and output."""
    base, use = weights(pipe), {"one": 0.8, "two": -0.4}
    with held.session(sources[2:]):
        held.use({"condition": 1.0})
        alone = forward(pipe)
    with held.session(sources[:2]), held.folded(use) if folded else held.kept():
        held.use(use)
        outer, written = forward(pipe), weights(pipe)
        assert same(pipe, base) != folded
        with pytest.raises(OSError), held.session(sources[2:]):
            assert held.names == ("condition",) and same(pipe, base)
            held.use({"condition": 1.0})
            assert torch.equal(forward(pipe), alone)
            with held.folded({"condition": 1.0}):
                torch.testing.assert_close(forward(pipe), alone, rtol=0, atol=1e-11)
            raise OSError("the picture of the condition is gone")
        assert held.names == ("one", "two") and same(pipe, written)
        assert torch.equal(forward(pipe), outer)
    assert held.names == () and same(pipe, base)


@torch.no_grad()
def test_an_inner_session_keeps_the_rows_of_the_outer_one(pipe, held, sources):
    with held.session(sources[:2]), held.rows([{"one": 1.0}, {"two": 0.5}]):
        outer = forward(pipe)
        with held.session(sources[2:]):
            held.use({"condition": 0.3})
            forward(pipe, rows=1)
        assert torch.equal(forward(pipe), outer)


@torch.no_grad()
def test_combine_is_told_the_layer_and_the_step(pipe, held, sources):
    step, seen = Step(3, 7, torch.tensor(300.0), torch.zeros(2, 4, 16, 16, dtype=torch.float64)), {}
    with held.session(sources[:2]):
        held.use({"one": 0.8, "two": 0.5})
        live = forward(pipe)

        def combine(path, told, base, each):
            seen[path] = (told, base.shape, each.shape)
            return base + each.sum(0)

        with held.combined(combine, {"one": 0.8, "two": 0.5}, step):
            torch.testing.assert_close(forward(pipe), live, rtol=0, atol=1e-11)
        touched = {path for path, module in held._layers["unet"].items() if _attached(module) is not None}
        assert set(seen) == touched
        assert all(told is step and each == (2, *base) for told, base, each in seen.values())
        assert torch.equal(forward(pipe), live)


def test_repair_says_whether_anything_was_left(pipe, held, sources):
    base = weights(pipe)
    assert held.repair() is False
    left = [held.session(sources[:2]), held.folded({"one": 1.0})]
    for context in left:
        context.__enter__()  # and never left, as by an interruption inside the cleaning up
    assert not same(pipe, base) and held.names
    assert held.repair() is True
    assert same(pipe, base) and held.names == () and held.repair() is False
    with held.session(sources[2:]), held.folded({"condition": 1.0}):
        inside = weights(pipe)
        while left:
            left.pop().gen.close()  # what was abandoned is closed by the garbage collector, at any time
        gc.collect()
        assert held.names == ("condition",) and same(pipe, inside)
    assert same(pipe, base)
    with held.session(sources[2:]) as receipts:
        assert [receipt.name for receipt in receipts] == ["condition"]


def test_a_group_sees_that_its_fold_is_not_whole(tmp_path):
    """Interrupted while the fold made way for another session: the next request of the group folds anew."""
    pipe = toys.sd()
    file = toys.lora(pipe, tmp_path / "fox.safetensors", seed=1)
    engine = Engine(UNetBackbone(pipe, "sd"), "toy")
    asked, before = laws.request("merge", Lora(str(file)), steps=4), laws.fingerprint(engine)
    with engine.group():
        expected = engine.run(asked).images[0].tobytes()
        inner = engine.adapters.session([])
        inner.__enter__()
        assert engine.run(asked).images[0].tobytes() == expected
    assert laws.fingerprint(engine) == before
    del inner
    gc.collect()
    assert laws.fingerprint(engine) == before


# where the originals of a fold are kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(("gib", "free", "device", "beside", "words"), [
    (8, {"cuda:0": 12, "cpu": 30}, "cuda:0", True, "kept in cuda:0"),
    (8, {"cuda:0": 9, "cpu": 30}, "cpu", False, "kept in main memory"),
    (8, {"cuda:0": 9, "cpu": 9}, None, True, "computed live.*8.0 GiB, cuda:0 has 9.0 GiB free and main memory has 9.0 GiB free"),
    (0.04, {"cuda:0": 0.2, "cpu": 0}, "cuda:0", True, "kept in cuda:0"),  # a small model needs little beside it
])
def test_the_originals_are_kept_where_there_is_room(gib, free, device, beside, words):
    kept = folding.keep(int(gib * GIB), torch.device("cuda:0"), lambda where: int(free[str(where)] * GIB))
    assert kept.device == (torch.device(device) if device else None)
    assert kept.beside == beside and re.search(words, kept.why)


def test_the_picture_says_that_there_was_no_room(tmp_path, monkeypatch):
    from composition.backbones.loading import placement

    pipe = toys.sd(dtype=torch.float64)
    file = toys.lora(pipe, tmp_path / "fox.safetensors", seed=1)
    engine = Engine(UNetBackbone(pipe, "sd"), "toy")
    asked = laws.request("merge", Lora(str(file)), steps=4)
    folds, honest = [], adapters.Adapters.folded
    monkeypatch.setattr(adapters.Adapters, "folded", lambda self, *rest: folds.append(rest) or honest(self, *rest))
    usual = engine.run(asked)
    assert len(folds) == 1 and "fold" not in usual.notes
    monkeypatch.setattr(placement, "available", lambda device: 0)
    live = engine.run(asked)
    assert len(folds) == 1 and "computed live" in live.notes["fold"] and "0.0 GiB free" in live.notes["fold"]
    monkeypatch.setattr(folding.Fold, "write", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    monkeypatch.setattr(placement, "available", lambda device: GIB)
    assert "ran out of memory" in engine.run(asked).notes["fold"]
