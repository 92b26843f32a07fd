"""The bundled models as they ship: stock diffusers runs them without our code, and makes Medley's pictures."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from composition import Engine, Lora, Request, samplers
from tests.reference import psnr

POCKET = Path(str(files("assets"))) / "pocket128"
PROMPT = "a raccoon and an owl on the moon"


@pytest.fixture(scope="module")
def engine():
    with Engine.open("pocket", device="cpu") as engine:
        yield engine


@pytest.fixture
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(POCKET / "sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


SIDE = 64  # half of the model's own: what both sides draw is compared, not looked at


def picture(pipe, side=SIDE):
    call = {"num_inference_steps": 10, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(7), "height": side, "width": side}
    return pipe(PROMPT, **call).images[0]


def drawn(engine, loras=(), side=SIDE):
    return engine.run(Request(PROMPT, loras=loras, seed=7, steps=10, guidance=5.0, size=(side, side))).images[0]


def test_stock_diffusers_runs_it_and_makes_our_picture(engine, pipe):
    assert psnr(picture(pipe, 128), drawn(engine, side=128)) > 60


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.4)])
def test_merge_is_stock_diffusers_with_the_same_loras(engine, pipe, weights):
    """load_lora_weights + set_adapters, as any user would: over 40 dB; and far from the picture without LoRAs."""
    names = ("raccoon", "owl")
    for name in names:
        pipe.load_lora_weights(str(POCKET / "loras"), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(list(names), list(weights))
    stock = picture(pipe)
    loras = [Lora(name, weight) for name, weight in zip(names, weights, strict=True)]
    ours = drawn(engine, loras)
    assert psnr(stock, ours) > 40
    assert psnr(drawn(engine), ours) < 30


def test_every_bundled_lora_applies_whole_and_shows(engine):
    found = [path.stem for path in engine.loras()]
    assert len(found) >= 18
    asking = {"seed": 3, "steps": 6, "size": (SIDE, SIDE)}
    plain = engine.run(Request("a fox in the snow", **asking)).images[0]
    for name in found:
        receipt = engine.inspect(name)
        assert receipt.coverage == 1.0 and not receipt.ignored and not receipt.no_effect, receipt.line()
        assert receipt.title and receipt.category and receipt.triggers, name
        changed = engine.run(Request(f"a fox in the snow, {receipt.triggers[0]}", loras=[Lora(name)], **asking)).images[0]
        assert psnr(plain, changed) < 30, name


def test_every_sampler_makes_a_picture(engine):
    """Not noise and not one colour: neighbouring pixels agree, and the picture has contrast."""
    for name in samplers():
        request = Request("a fox in the snow", sampler=name, steps=12, guidance=4.0, seed=3, size=(SIDE, SIDE))
        pixels = np.asarray(engine.run(request).images[0], dtype=float)
        rough = np.abs(np.diff(pixels, axis=1)).mean()
        assert pixels.std() > 15 and rough < 0.6 * pixels.std(), (name, pixels.std(), rough)
