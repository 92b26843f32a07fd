"""A toy model in a folder with three LoRAs, the command line called in this process, and a browser."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from PIL import Image
from safetensors.torch import load_file, save_file

from app.cli import program as cli
from composition import Lora, Receipt, Request, Result
from tests import toys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-component-update",
         "--disable-sync"]


class Toy(NamedTuple):
    """model: a diffusers folder. loras: a folder with fox, owl and ink; fox and owl say their trigger words."""

    model: Path
    loras: Path


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    root = tmp_path_factory.mktemp("toy")
    pipe = toys.sd(blocks=(16, 32))
    pipe.save_pretrained(root / "model")
    (root / "loras").mkdir()
    for seed, name in enumerate(("fox", "owl", "ink")):
        file = toys.lora(pipe, root / "loras" / f"{name}.safetensors", seed=seed, targets=("attn",), text=False)
        if name != "ink":
            said = {"trigger_words": f"{name}word", "category": "character"}
            save_file(load_file(file), file, metadata={"format": "pt", **said})
    return Toy(root / "model", root / "loras")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def medley(capsys, monkeypatch, tmp_path) -> Callable[..., Answer]:
    """`medley ARGS` in an empty folder of its own: exit code, stdout, stderr."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "DIFFUSERS_VERBOSITY",
                 "TRANSFORMERS_VERBOSITY", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "1" if name.startswith("HF") else "passive" if name.startswith("OMP") else "error")  # the commands set them; this puts them back
    monkeypatch.setenv("MEDLEY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Answer:
        words = [str(argument) for argument in arguments]
        code = cli.run(lambda: typer.main.get_command(cli.app).main(words, prog_name="medley", standalone_mode=False), words)
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call


@pytest.fixture
def result() -> Result:
    """Two made-up pictures with everything a record may hold."""
    loras = (Lora("styles/ink.safetensors", weight=0.8), Lora("owl", weight=1.2, text_weight=0.5))
    request = Request(prompt="a fox, 50% off: \"now\"", negative="blur, (bad:1.2)", loras=loras, method="switch",
                      options={"tau": 3}, sampler="euler-a", steps=12, guidance=4.5, seed=41, count=2)
    receipts = tuple(
        Receipt(name=lora.name, path=f"/somewhere/{lora.name}.safetensors", sha256=digit * 64, tensor_sha256=digit * 64, data_sha256=digit * 64,
                family="sd", layout="kohya", tensors=9, applied=8, components={"unet": {"tensors": 8, "modules": 4}},
                ignored={"no such layer": ("a.b",)}, ranks={4: 4}, alphas={2.0: 4}, triggers=("inky",),
                metadata={"ss_output_name": "x"})
        for lora, digit in zip(loras, "ab", strict=True))
    images = tuple(Image.effect_noise((48, 32), 60.0 + index).convert("RGB") for index in range(2))
    return Result(images, request, {"evaluations": 24, "leaders": ["ink", "owl"]}, {"denoise": 1.5}, receipts)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        message = "chromium is not installed: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
