"""The whole recipe, from art to the figures of both bases, at a size at which nothing is learned."""

import json
import sys
from functools import partial

import pytest
from diffusers import FluxPipeline, StableDiffusionPipeline
from safetensors import safe_open

from assets.recipe import controlled, judge, measure, previews
from assets.recipe.__main__ import main
from composition.profiling import frequency
from retrieval.judge import Judge
from tests.assets import art


@pytest.mark.slow
def test_all_stages_run_in_an_empty_folder(tmp_path, monkeypatch):
    art.draw(tmp_path / "work/art", more=[("1f993", "zebra"), ("1f994a", "pony")])
    for module in (measure, controlled, previews):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(frequency, "measure", partial(frequency.measure, steps=4, seeds=1))
    monkeypatch.setattr(judge, "settle", partial(judge.settle, count=2))
    monkeypatch.setattr(sys, "argv", [
        "recipe", "all", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--budget", "0.1", "--size", "32",
        "--objects", "20", "--places", "3", "--variants", "3", "--blocks", "32,64", "--batch", "4", "--workers", "2", "--no-compile",
        "--loras", "raccoon,moon", "--lora-steps", "2", "--together", "2", "--condition-steps", "1", "--pairs", "12",
        "--measured", "0.01"])  # fmt: skip
    main()
    out = tmp_path / "out"
    for folder, kind in (("sd", StableDiffusionPipeline), ("flux", FluxPipeline)):
        pipe = kind.from_pretrained(out / folder, local_files_only=True)
        assert pipe.vae.config.latent_channels == 32 and pipe.vae.config.sample_size == 32
    for folder in ("loras", "flux-loras"):
        for name in ("raccoon", "moon"):
            with safe_open(out / folder / f"{name}.safetensors", "pt") as opened:
                said = opened.metadata()
            assert {"title", "category", "trigger_words", "base", "preview"} <= set(said)
    assert {file.stem for file in (out / "flux-conditions").iterdir()} == {"canny", "layout", "subject"}
    assert "a raccoon" in Judge.open(str(out / "clip")).thresholds and (out / "clip/confusion.json").is_file()
    figures = {file.stem for file in (tmp_path / "work").glob("figures-*.json")}
    assert figures == {f"figures-{name}" for name in ("judge", "base", "loras", "controlnet", "flux", "flux-loras", "conditions")}
    assert json.loads((tmp_path / "work/figures-base.json").read_text())["one"]["objects present"] >= 0
