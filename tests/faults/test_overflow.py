"""Numbers that overflow are an error that names the step and the LoRA: a black picture is never a result."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from composition import Engine, Lora, Refused, backbones, methods
from composition.loop import LOOK, NotFinite, sample
from tests import toys
from tests.composition import laws
from tests.composition.devices.pretended import DEVICE, pretended

TOO_LARGE = {
    "65504 in float16": lambda name, value: torch.where(value > 0, 65504.0, -65504.0).to(torch.float16),
    "1e38": lambda name, value: torch.where(value > 0, 1e38, -1e38),
    "alpha 1e38": lambda name, value: torch.tensor(1e38) if name.endswith("alpha") else value,
}


def lora(pipe, folder, kind):
    """A LoRA file of which some numbers are as large as they can be."""
    file = toys.lora(pipe, folder / "flood.safetensors", seed=2, layout="kohya", targets=("attn",), text=False)
    change = TOO_LARGE[kind]
    save_file({name: value if kind != "alpha 1e38" and name.endswith("alpha") else change(name, value) for name, value in load_file(file).items()}, file)
    return file


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["float32", "float16"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    pipe = toys.sd(dtype=request.param)
    toys.lora(pipe, folder / "owl.safetensors", seed=1, targets=("attn",), text=False)
    return Engine(backbones.of(pipe, "sd"), "toy", folders=[folder])


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_every_method_says_where_it_overflowed_and_whose_update_is_the_largest(engine, tmp_path, kind):
    file = lora(engine.backbone.pipeline, tmp_path, kind)
    pair = [Lora("owl", binds="the owl", region=(0.0, 0.0, 0.5, 1.0)), Lora(str(file), binds="the fox", region=(0.5, 0.0, 1.0, 1.0))]
    for method in methods.all():
        options = {"clora": {"until": 0.5, "rounds": 0}, "switch": {"tau": 1}, "switch-a": {"tau": 1}, "w-switch": {"tau": 1}}.get(method, {})
        before = laws.fingerprint(engine)
        with pytest.raises(Refused, match=r"overflowed at step [12] of 3.*LoRA flood has the largest update") as error:
            engine.run(laws.request(method, *pair, steps=3, options=options))
        assert "float32" in str(error.value) and error.value.__cause__ is None
        assert laws.fingerprint(engine) == before, method
    assert engine.run(laws.request("merge", pair[0], steps=3)).images


def test_a_weight_counts_as_much_as_the_factors(engine, tmp_path):
    file = str(lora(engine.backbone.pipeline, tmp_path, "1e38"))
    for weights, name in (((0.5, -2.0), "flood#2"), ((2.0, 0.5), "flood")):
        with pytest.raises(Refused, match=f"LoRA {name} has the largest update"):
            engine.run(laws.request("merge", *(Lora(file, weight=weight) for weight in weights), steps=2))


def test_what_overflows_in_decoding_alone_is_said_too(engine, monkeypatch):
    vae = engine.backbone.pipeline.vae
    honest = vae.decode
    monkeypatch.setattr(vae, "decode", lambda *a, **k: tuple(part * torch.inf for part in honest(*a, **k)))
    with pytest.raises(Refused, match="while the picture was decoded.*no LoRA is on.*float32"):
        engine.run(laws.request("merge", steps=2))


class _Euler:
    def step(self, value, t, latents, return_dict):
        return (latents + value,)


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize("bad", [1, 3])
def test_another_device_is_asked_seldom_and_the_first_bad_step_is_named(steps, bad):
    """A look waits for the device: every few steps and after the last, and the step is the one that was bad first."""
    seen = []

    def predict(step):
        seen.append(step.index)
        value = torch.full_like(step.latents, torch.nan) if step.index + 1 == bad else torch.zeros_like(step.latents)
        return value, step.latents

    with pretended(), pytest.raises(NotFinite) as error:
        sample(predict, _Euler(), torch.zeros(1, 4, 2, 2).to(DEVICE), torch.arange(steps))
    assert (error.value.step, error.value.count) == (bad, steps)
    assert len(seen) == min(steps, LOOK)


def test_the_exit_code_is_not_0_and_no_picture_is_there(medley, toy, tmp_path):
    file = lora(toys.sd(blocks=(16, 32)), tmp_path, "1e38")  # as the model in toy's folder
    call = ("a fox", "--model", toy.model, "--lora", file, "--steps", 2, "--out", "out")
    said = medley("generate", *call)
    assert said.code == 2 and "overflowed at step 1 of 2" in said.err and "flood" in said.err
    assert not list((tmp_path / "out").glob("*.png"))
    lines = [{"prompt": "a fox", "steps": 2}, {"prompt": "a fox", "steps": 2, "loras": [{"source": str(file)}]}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = medley("batch", "m.jsonl", "--model", toy.model, "--out", "b")
    assert said.code == 3 and "line 2: the numbers overflowed" in said.err
    assert len(list((tmp_path / "b/pictures").glob("*.png"))) == 1


def test_a_request_without_overflow_is_unchanged(engine):
    asked = laws.request("merge", Lora("owl"), steps=3)
    assert engine.run(asked).images[0].tobytes() == engine.run(replace(asked)).images[0].tobytes()
