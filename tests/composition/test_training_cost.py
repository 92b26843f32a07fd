"""What a training step costs: as many operations for sixteen adapters as for two, and nobody waited for."""

import functools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from composition.adapters import Adapters
from composition.training import batches, draws, encodings
from composition.training.batches import Batches
from composition.training.concept import Learning, choose, train
from composition.training.losses import Losses
from composition.training.plan import Plan
from composition.training.precision import HalfBase
from composition.training.state import LOOK, State
from tests import toys
from tests.composition.test_training import concept, double, toy, trained  # noqa: F401  double is a fixture

LAYERS = ("attention", "feed_forward", "convolution")


class Counted(TorchDispatchMode):
    """How often each operation was dispatched, views included."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] = self.seen.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def one_step(count, plan, make):
    """The operations of one whole step of so many adapters: of its rows and prompts; of forward, backward and update."""
    backbone, adapters = toy(torch.float32, make)
    concepts = [concept(f"c{k}", k, dtype=torch.float32) for k in range(count)]
    layers = choose(backbone.components, plan.targets)
    try:
        with adapters.training([one.name for one in concepts], plan.rank, layers) as factors:
            for model in backbone.components.values():
                model.requires_grad_(False)
            state, rows = State(factors, concepts, plan), Batches(backbone, adapters, concepts, plan)
            learn = Learning(backbone, adapters, plan)
            state.advance(learn(rows.draw(0)))  # the optimiser's moments exist from the second step on
            with Counted() as drawing:
                batch = rows.draw(1)
            with Counted() as learning:
                state.advance(learn(batch))
            return drawing.seen, learning.seen
    finally:
        adapters.close()


@pytest.mark.parametrize(("make", "extra"), [
    (toys.sd, {"targets": LAYERS}), (toys.sd, {"targets": LAYERS, "half": True, "keep": 0.5}),
    (toys.sd, {"targets": ("attention", "text"), "keep": 0.5}), (toys.sdxl, {"targets": ("attention", "text")}),
    (toys.flux, {"targets": ("attention", "feed_forward", "projection"), "noise": (0.0, 1.0)}), (toys.sd3, {"keep": 0.5})])
def test_a_step_is_as_many_operations_for_sixteen_as_for_two(make, extra):
    plan = Plan(rank=2, steps=4, batch=2, **extra)
    two, sixteen = (one_step(count, plan, make) for count in (2, 16))
    assert two == sixteen
    assert sum(two[1].values()) > 100
    # What reads a number, or makes a tensor as long as numbers say, waits for the device.
    assert not [name for name in two[1] if any(word in name for word in ("_local_scalar", "nonzero", "equal", "unique", "masked_select"))]


def test_an_update_is_a_handful_of_operations_whatever_the_layers():
    counts = []
    for targets in (("attention",), LAYERS):
        backbone, adapters = toy(torch.float32)
        plan = Plan(rank=2, batch=1, targets=targets)
        with adapters.training(["fox"], 2, choose(backbone.components, targets)) as factors:
            state = State(factors, [concept("fox", dtype=torch.float32)], plan)
            for _ in range(2):
                factors.leaf.grad = torch.ones_like(factors.leaf)
                with Counted() as counted:
                    state.advance(torch.ones(1))
        adapters.close()
        counts.append(sum(counted.seen.values()))
    assert counts[0] == counts[1] < 15


def test_losses_are_read_when_somebody_looks():
    values = torch.tensor([1.0, 2.0])
    with Counted() as counted:
        losses = Losses(["a", "b"], values)
        assert list(losses) == ["a", "b"] and len(losses) == 2
    assert not counted.seen
    assert dict(losses) == {"a": 1.0, "b": 2.0}
    values.zero_()
    assert losses["b"] == 2.0


@pytest.mark.parametrize("when", [2, LOOK + 3])
def test_a_loss_that_is_no_number_is_found_before_anything_is_written(tmp_path, monkeypatch, when):
    honest, steps = Learning.__call__, iter(range(100))

    def broken(self, batch):
        losses = honest(self, batch)
        return losses * float("nan") if next(steps) == when else losses

    monkeypatch.setattr(Learning, "__call__", broken)
    backbone, adapters = toy(torch.float32)
    with pytest.raises(RuntimeError, match=f"not finite at step {when}.*lower rate"):
        train(backbone, adapters, [concept("fox", dtype=torch.float32)], Plan(rank=2, steps=LOOK + 5, batch=1), tmp_path,
              checkpoint=tmp_path / "c.pt", save_every=LOOK + 4)  # fmt: skip
    adapters.close()
    assert not list(tmp_path.iterdir())


def test_rows_prepared_ahead_are_the_same_rows(tmp_path, monkeypatch, double):  # noqa: F811
    """As on a device with a queue of its own: the next step's rows are prepared in another thread."""
    names, honest = [], Batches._rows
    monkeypatch.setattr(Batches, "_rows", lambda self, step: names.append(threading.current_thread().name) or honest(self, step))
    for ahead in (False, True):
        monkeypatch.setattr(Batches, "__init__", _ahead(Batches.__init__, ahead))
        backbone, adapters = toy()
        train(backbone, adapters, [concept("fox")], Plan(rank=2, steps=4, batch=2, keep=0.4), tmp_path,
              checkpoint=tmp_path / f"{ahead}.pt", save_every=4)  # fmt: skip
        adapters.close()
        monkeypatch.undo()
        monkeypatch.setattr(Batches, "_rows", lambda self, step: names.append(threading.current_thread().name) or honest(self, step))
    assert torch.equal(trained(tmp_path / "False.pt"), trained(tmp_path / "True.pt"))
    assert [name.startswith("rows") for name in names] == [False] * 4 + [True] * 4
    assert not any(thread.name.startswith("rows") for thread in threading.enumerate())


def _ahead(honest, wanted):
    return lambda self, *args: honest(self, *args, ahead=wanted)


def test_what_is_drawn_follows_from_the_concept_alone():
    plan = Plan(rank=2, steps=50, batch=8, keep=0.25, empty=0.1, seed=3)
    backbone, adapters = toy()
    adapters.close()
    kinds = batches.noise.of(backbone.scheduler)
    fox, owl = concept("fox", 1), concept("owl", 2, count=9)
    alone, company = draws.draws([owl], plan, kinds), draws.draws([fox, owl], plan, kinds)
    assert torch.equal(company.pictures[:, 8:], alone.pictures + 6)
    for mine, together in ((alone.times, company.times), (alone.kept, company.kept)):
        assert torch.equal(together[:, 8:], mine)
    assert [alone.words[n] for n in alone.prompts.flatten()] == [company.words[n] for n in company.prompts[:, 8:].flatten()]
    noise = draws.Fresh([fox, owl], plan, plan.batch).draw(7, (4, 2, 2), torch.float32)
    assert torch.equal(noise[8:], draws.Fresh([owl], plan, plan.batch).draw(7, (4, 2, 2), torch.float32))
    assert not torch.equal(noise[8:], draws.Fresh([owl], plan, plan.batch).draw(8, (4, 2, 2), torch.float32))
    other = draws.Fresh([owl], replace(plan, seed=4), plan.batch).draw(7, (4, 2, 2), torch.float32)
    assert not np.isclose(noise[8:], other).any()
    many = draws.Fresh([fox], plan, plan.batch).draw(0, (50, 50), torch.float64)
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03
    assert 0.2 < company.kept.double().mean() < 0.3
    own, empty = set(fox.prompts), 0
    for step in range(plan.steps):
        for row in range(8):
            word = company.words[company.prompts[step, row]]
            assert word in (fox.others if company.kept[step, row] else {*own, ""})
            empty += word == "" and not company.kept[step, row]
    assert 0 < empty < 60


def test_encodings_are_those_of_each_prompt_and_may_lie_elsewhere(monkeypatch):
    backbone, adapters = toy()
    adapters.close()
    monkeypatch.setattr(encodings, "TOGETHER", 2)
    words = ["a fox", "an owl", "a cat", "", "a dog in the snow"]
    near, far = encodings.Encodings(backbone, words), encodings.Encodings(backbone, words, room=0)
    assert {table.device for table in far.tables.values()} == {torch.device("cpu")}
    picked = torch.tensor([4, 0, 0, 3])
    with torch.no_grad():
        wanted = backbone.encode([words[number] for number in picked], None).values["text"]
    for one in (near, far):
        torch.testing.assert_close(one.rows(picked).values["text"], wanted, rtol=1e-10, atol=1e-10)


def test_a_base_in_halves_gives_the_same_step_and_has_its_own_weights_between(tmp_path):
    """Against autocast by itself, which casts each weight in every call."""
    plan = Plan(rank=2, steps=3, batch=2, half=True, targets=LAYERS, keep=0.4)
    found = []
    for lent in (True, False):
        backbone, adapters = toy(torch.float32)
        before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in backbone.denoiser.named_parameters()}
        with pytest.MonkeyPatch.context() as patch:
            if not lent:
                patch.setattr(HalfBase, "__init__", lambda self, *_: setattr(self, "lent", []))
            train(backbone, adapters, [concept("fox", dtype=torch.float32)], plan, tmp_path, checkpoint=tmp_path / "c.pt", save_every=3,
                  on_step=lambda *_, b=before, d=backbone.denoiser: [_same(b[n], p) for n, p in d.named_parameters()])  # fmt: skip
        adapters.close()
        found.append(trained(tmp_path / "c.pt"))
        (tmp_path / "c.pt").unlink()
    assert torch.equal(*found)


def _same(before, parameter):
    held, where, value = before
    assert parameter is held and parameter.data_ptr() == where and torch.equal(parameter, value)


def test_a_quantised_layer_is_trained_by_its_declared_sizes():
    class Packed(nn.Linear):
        """As quantised layers are: the weight is a row of bytes, of no shape of the layer's."""

        def __init__(self):
            super().__init__(6, 4)
            self.kept = self.weight.detach().clone()
            self.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, input):
            return nn.functional.linear(input, self.kept, self.bias)

    model = nn.ModuleDict({"to_q": Packed(), "conv": nn.Conv2d(6, 8, (3, 1), groups=2)}).requires_grad_(False)
    adapters = Adapters({"unet": model}, family="sd", block=lambda _: "")
    with adapters.training(["a", "b"], 2, {"unet": ["to_q", "conv"]}) as trained:
        assert [tuple(f.down.shape) for f in trained.factors(1)["unet"].values()] == [(2, 6), (2, 3, 3, 1)]
        assert [tuple(f.up.shape) for f in trained.factors(1)["unet"].values()] == [(4, 2), (8, 2)]
        trained.leaf.data.normal_()
        with adapters.in_turn(3):
            model["to_q"](torch.randn(6, 5, 6)).sum().backward()
        assert (trained.leaf.grad[:, :20] != 0).all() and not trained.leaf.grad[:, 20:].any()  # 2 x 6 and 4 x 2, then the convolution
    adapters.close()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "small", "half", "targets"), [
    (toys.flux, {"layers": 1}, False, ("attention", "feed_forward", "projection")), (toys.sd, {"blocks": (16, 32)}, True, LAYERS)],
                         ids=["flux", "sd-half"])  # fmt: skip
def test_compiled_learns_the_same(tmp_path, monkeypatch, shapes_unchecked, make, small, half, targets):
    """By the compiler's own kernels of operations: generating code for a processor takes many minutes, and is not ours."""
    torch.compiler.reset()  # what other tests compiled would count as our graphs' variants
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    seen = {}
    for compiled in (False, True):
        backbone, adapters = toy(torch.float32, make, **small)
        losses = seen[compiled] = []
        before = dict(vars(backbone.denoiser))
        train(backbone, adapters, [concept(name, dtype=torch.float32) for name in ("fox", "owl")],
              Plan(rank=2, rate=1e-2, steps=4, batch=2, warm=1, half=half, targets=targets), tmp_path, compiled=compiled,
              on_step=lambda step, found, losses=losses: losses.append(list(found.values())))  # fmt: skip
        assert vars(backbone.denoiser) == before
        adapters.close()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch.testing.assert_close(torch.tensor(seen[True]), torch.tensor(seen[False]), rtol=2e-2 if half else 1e-4, atol=0)
