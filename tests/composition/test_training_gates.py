"""Training AutoLoRA's gates: gradients, both terms, what stays as it is, resuming; and the rows that the model draws for itself."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Generator

from composition import Engine, Lora, Refused, backbones
from composition.adapters import Adapters
from composition.methods.shared import gating
from composition.profiling import gate_pictures
from composition.profiling.gate_pictures import Drawn, FromDrawn, Known
from composition.training import gates
from composition.training.still import still
from tests import toys

PLAN = gates.Plan(steps=4, rate=5e-2, apart=0.0, empty=0.0)


@pytest.fixture(scope="module", params=["sd", "flux"])
def base(request, lora_files):
    """(backbone, adapters, LoRAs by name)"""
    pipe = {"sd": toys.sd, "flux": toys.flux}[request.param](dtype=torch.float32)
    backbone = backbones.of(pipe, request.param)
    adapters = Adapters(backbone.components, family=backbone.family, block=backbone.block)
    loras = {name: (Lora(str(path)), path, kind) for name, path, kind in zip(("a", "b", "c"), lora_files[request.param], ("character", "style", "place"), strict=True)}
    yield backbone, adapters, loras
    adapters.close()


def rows(step, others=("", "")):
    generator = Generator().manual_seed(step)
    return gates.Rows({"a": 1.0, "b": 0.9, "c": 0.8}, torch.randn(2, 4, 8, 8, generator=generator), ["the fox", "the owl, ink"], list(others))


def learning(base, kind="rank", **plan):
    backbone, adapters, loras = base
    made = gating.Gating(gating.Design(kind, "toy", {path: gates._width(adapters, path) for path in gates.touched(adapters, loras)}, film=kind == "rank"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return gates._Learning(backbone, adapters, made, loras, replace(PLAN, kind=kind, **plan)), made


@pytest.mark.parametrize("kind", ["layer", "rank", "element"])
def test_gradients_are_the_slopes_of_the_loss(base, kind):
    """Of the kind "rank" nearly: what gates read of earlier layers counts as given."""
    step, made = learning(base, kind)
    with still(base[1].components.values()):
        step(0, rows(0))
        rng = random.Random(0)
        for name, value in made.named_parameters():
            places = value.grad.abs().flatten().topk(3).indices.tolist()
            for place in [rng.choice(places)]:
                around = []
                for by in (1e-3, -1e-3):
                    with torch.no_grad():
                        value.view(-1)[place] += by
                        around.append(_loss(step, rows(0)))
                        value.view(-1)[place] -= by
                slope = (around[0] - around[1]) / 2e-3
                assert float(value.grad.view(-1)[place]) == pytest.approx(slope, rel=0.25 if kind == "rank" else 0.05, abs=2e-4), name


def _loss(step, some):
    """The first term, without gradients."""
    generator = Generator().manual_seed(step.plan.seed * 2**32)
    t = step.noise.times(2, step.plan.noise, generator)
    fresh = torch.randn(some.latents.shape, generator=generator)
    noisy, goal = step.noise.mix(some.latents, fresh, t)
    with step.adapters.session([(name, *step.loras[name][:2]) for name in some.weights]):
        return float(step._losses(some, noisy, goal, t, list(some.prompts)).mean())


def test_the_second_term_wants_other_prompts_to_fit_worse(base):
    """Its share of the gradient is that of max(0, margin + loss - other loss), in the same noise; none once the margin is kept."""
    some = rows(0, others=("an owl on the moon", ""))
    with still(base[1].components.values()):
        plain, made = learning(base)
        plain(0, some)
        without = made.table.grad.clone()
        step, made = learning(base, apart=1.0, margin=10.0)
        _, kept = step(0, some)
        assert float(kept) == 0.0
        generator = Generator().manual_seed(0)
        t = step.noise.times(2, None, generator)
        noisy, goal = step.noise.mix(some.latents, torch.randn(some.latents.shape, generator=generator), t)
        both = made.table.grad.clone()
        made.zero_grad()
        with step.adapters.session([(name, *step.loras[name][:2]) for name in some.weights]):
            losses = step._losses(some, noisy, goal, t, list(some.prompts))
            other = step._losses(some, noisy[:1], goal[:1], t[:1], [some.others[0]])
            (losses.mean() + (10.0 + losses[0] - other[0]) / 2).backward()
        torch.testing.assert_close(made.table.grad, both, rtol=1e-3, atol=1e-6)
        assert not torch.allclose(both, without)
        still_kept, made = learning(base, apart=1.0, margin=0.0)
        _, share = still_kept(0, some._replace(others=some.prompts))
        assert float(share) == 1.0


def test_gates_learn_and_nothing_else_does(base, tmp_path):
    backbone, adapters, loras = base
    before = {name: value.clone() for component in adapters.components.values() for name, value in component.named_parameters()}
    seen = []
    file = gates.train(backbone, adapters, loras, lambda step: rows(0), replace(PLAN, kind="layer", steps=12), tmp_path / "gates.safetensors", base="toy",
                       on_step=lambda step, loss, kept: seen.append(loss))
    made = gating.read(file)
    assert made.design.base == "toy" and set(made.design.layers) == set(gates.touched(adapters, loras))
    assert float(made.table.abs().max()) > 0 and len(seen) == 12
    assert all(torch.equal(value, before[name]) for component in adapters.components.values() for name, value in component.named_parameters())
    assert all(not value.requires_grad or value.grad is None for component in adapters.components.values() for value in component.parameters())
    assert adapters.names == ()


def test_stopped_and_resumed_is_as_never_stopped(base, tmp_path):
    backbone, adapters, loras = base
    whole = gates.train(backbone, adapters, loras, rows, PLAN, tmp_path / "whole.safetensors", base="toy")
    count = iter(range(100))
    part = gates.train(backbone, adapters, loras, rows, PLAN, tmp_path / "part.safetensors", base="toy", checkpoint=tmp_path / "gates.training",
                       stop=lambda: next(count) == 1)
    assert part is None and gates.reached(tmp_path / "gates.training") == 2
    with pytest.raises(Refused, match="another plan"):
        gates.train(backbone, adapters, loras, rows, replace(PLAN, rate=1e-3), tmp_path / "part.safetensors", base="toy", checkpoint=tmp_path / "gates.training")
    part = gates.train(backbone, adapters, loras, rows, PLAN, tmp_path / "part.safetensors", base="toy", checkpoint=tmp_path / "gates.training")
    first, second = (gating.read(file).state_dict() for file in (whole, part))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "gates.training").write_bytes(b"damaged")
    with pytest.raises(Refused, match="damaged"):
        gates.train(backbone, adapters, loras, rows, PLAN, tmp_path / "again.safetensors", base="toy", checkpoint=tmp_path / "gates.training")


def test_plans_that_make_no_sense_are_refused():
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"empty": 1.0}, {"apart": -1.0}, {"margin": -0.1}):
        with pytest.raises(Refused):
            gates.Plan(**wrong)


KNOWN = {"fox": Known(Lora("fox"), "character", "zorb fox"), "owl": Known(Lora("owl"), "character", "kren owl"), "ink": Known(Lora("ink"), "style", "ink lines"),
         "moon": Known(Lora("moon"), "place", "on the moon")}


def test_prompts_name_what_is_drawn():
    fox, owl, ink, moon = KNOWN.values()
    assert gate_pictures.prompt_of([fox], "in the snow") == "zorb fox in the snow"
    assert gate_pictures.prompt_of([ink, fox, owl], "") == "zorb fox and kren owl, ink lines"
    assert gate_pictures.prompt_of([moon, owl], "in a room") == "kren owl on the moon"
    assert gate_pictures.prompt_of([ink], "") == "ink lines"


def test_rows_have_the_loras_that_they_name_and_others():
    drawn = [Drawn(frozenset(names), torch.full((3, 1, 2, 2), float(number)), tuple(f"{'+'.join(names)} {i}" for i in range(3)))
             for number, names in enumerate([("fox",), ("owl",), ("ink",), ("fox", "ink")])]
    draw, seen = FromDrawn(drawn, KNOWN, rows=6), set()
    for step in range(40):
        some = draw(step)
        assert 2 <= len(some.weights) <= 4 and len(some.latents) == len(some.prompts) == len(some.others) == 6
        for latents, prompt, other in zip(some.latents, some.prompts, some.others, strict=True):
            names = set(prompt.split()[0].split("+"))
            assert names <= set(some.weights) and float(latents[0, 0, 0]) == [("fox",), ("owl",), ("ink",), ("fox", "ink")].index(tuple(prompt.split()[0].split("+")))
            assert not other or not names & set(other.split()[0].split("+"))
        seen.add(len(some.weights))
        again = draw(step)
        assert again.weights == some.weights and again.prompts == some.prompts
    assert seen == {2, 3, 4}


def test_the_model_draws_each_alone_and_pairs(lora_files):
    with Engine(backbones.of(toys.sd(), "sd"), "toy") as engine:
        loras = {name: KNOWN[name]._replace(lora=Lora(str(path))) for name, path in zip(("fox", "owl", "ink"), lora_files["sd"], strict=True)}
        drawn = gate_pictures.draw(engine, loras, each=2, pairs=3, steps=2)
        assert {group.names for group in drawn} == {frozenset(names) for names in (("fox",), ("owl",), ("ink",), ("fox", "owl"), ("fox", "ink"), ("owl", "ink"))}
        assert all(group.latents.shape[:2] == (2, 4) and len(group.prompts) == 2 for group in drawn)
        assert gate_pictures.draw(engine, loras, each=2, pairs=3, steps=2, stop=lambda: True) == []
        with pytest.raises(Refused, match="two LoRAs or more"):
            gate_pictures.draw(engine, {"fox": loras["fox"]})
