"""The bundled model is a stock folder: it draws without this project's code, is small, and says what it is made of."""

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

ASSETS = Path(__file__).parents[2] / "assets"
POCKET, SECOND = ASSETS / "pocket128", ASSETS / "pocket"
SHIPPED = [file for folder in ("pocket/**/*", *(f"pocket128/{part}/**/*" for part in ("sd", "clip", "loras", "profiles", "controlnet-canny")))
           for file in ASSETS.glob(folder) if file.is_file()]  # fmt: skip
WEIGHTS = sorted(file for file in SHIPPED if file.suffix == ".safetensors" and file.stem != "gates")  # of 4 KB, as trained
LORAS = sorted((POCKET / "loras").glob("*.safetensors"))
FLUX = sorted((SECOND / "flux-loras").glob("*.safetensors"))


@pytest.fixture(scope="module")
def pipe():
    made = StableDiffusionPipeline.from_pretrained(POCKET / "sd", local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, prompt, steps=2, side=64):
    image = pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), height=side, width=side).images[0]
    return np.asarray(image).astype(int)


def test_the_stock_pipeline_draws_in_single_precision(pipe):
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    assert draw(pipe, "a fox in the snow", side=None).shape == (side, side, 3)
    assert pipe.tokenizer.pad_token_id == pipe.tokenizer.eos_token_id


def test_it_is_small_and_in_half_precision():
    assert sum(file.stat().st_size for file in SHIPPED) < 106e6
    assert all(f.stat().st_size <= 16e6 for f in WEIGHTS)
    for file in WEIGHTS:
        with safe_open(file, "pt") as opened:
            kinds = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
        assert kinds == {"F16"} or (file.parent.name == "clip" and kinds == {"F16", "I64"})


@pytest.mark.parametrize("base", [POCKET / "sd", SECOND / "flux"], ids=["sd", "flux"])
def test_text_keys_are_read_by_every_transformers(base):
    with safe_open(base / "text_encoder/model.safetensors", "pt") as opened:
        assert all(key.startswith("text_model.") for key in opened.keys())  # noqa: SIM118
    for config in base.glob("text_encoder*/config.json"):
        assert json.loads(config.read_text())["dtype"] == "float32"


def test_no_file_names_a_folder_it_was_made_in():
    for file in (file for file in SHIPPED if file.suffix == ".json"):
        assert "_name_or_path" not in file.read_text()


@pytest.mark.parametrize("file", LORAS, ids=lambda f: f.stem)
def test_a_lora_loads_in_stock_diffusers_and_changes_the_picture(pipe, file):
    pytest.importorskip("peft")
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert facts["base"] == "pocket" and facts["title"] and facts["category"] in ("character", "style", "place", "object", "clothing")
    prompt = f"a fox, {facts['trigger_words'].split(',')[0]}"
    bare = draw(pipe, prompt)
    pipe.load_lora_weights(file)
    try:
        assert np.abs(draw(pipe, prompt) - bare).mean() > 1
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize(("files", "base"), [(LORAS, "pocket"), (FLUX, "pocket-flux")], ids=["pocket", "pocket-flux"])
def test_a_testbed_of_loras_is_bundled(files, base):
    kinds = Counter()
    for file in files:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
        assert facts["base"] == base and facts["trigger_words"] and facts["title"]
        kinds[facts["category"]] += 1
        picture = Image.open(io.BytesIO(base64.b64decode(facts["preview"])))
        assert picture.format == "PNG" and max(picture.size) <= 128
    if base == "pocket":
        assert kinds["character"] >= 6 and all(kinds[kind] >= 3 for kind in ("clothing", "object", "place", "style"))
    else:
        assert kinds["character"] >= 4 and kinds["place"] >= 2 and kinds["style"] >= 2 and kinds["object"] >= 1
