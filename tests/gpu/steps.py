"""Part c: what a step of Composite, CMLoRA and CLoRA fast costs over Merge's, with three LoRAs.

On Pocket, Pocket-FLUX and a UNet of Stable Diffusion 1.5's size with random weights. Whole runs, prompts already encoded, the decoding left
out: the time from the first latents to the last by the device's own clock over the number of steps, methods in turn, medians over rounds. Merge
is timed as it is used (weights folded) and live (the LoRAs computed in every step, as the others must).
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from composition import Engine, Lora, Request, backbones
from tests import toys
from tests.bench import cmlora as bench
from tests.gpu import clock
from tests.gpu.chapter import Setting
from tests.gpu.report import Report
from tests.gpu.scene import MODELS, request, there

ARMS: Mapping[str, tuple[str, bool]] = {  # row to (method, folding allowed)
    "merge": ("merge", True), "merge live": ("merge", False), "composite": ("composite", True), "cmlora": ("cmlora", True),
    "clora-fast": ("clora-fast", True)}
STEPS = 25
ROUNDS = 3


def measure(setting: Setting, report: Report) -> None:
    setting.start(report)
    steps = 2 if setting.tiny else STEPS
    report.remark(f"three LoRAs, {steps} steps, prompts encoded before; over merge: medians of the ratios within a round")
    for model in MODELS[:1] if setting.tiny else MODELS:
        if there(model):
            report.attempt(model, _bundled, setting, report, model, steps)
        else:
            report.remark(f"{model} is not in this copy of the repository")
        clock.free(setting.device)
    report.attempt("SD1.5 size", _random, setting, report, steps)


def _bundled(setting: Setting, report: Report, model: str, steps: int) -> None:
    with Engine.open(model, device=setting.device, offload="none") as engine:
        _arms(setting, report, engine, {name: request(method, steps=steps, tiny=setting.tiny) for name, (method, _) in ARMS.items()})


def _random(setting: Setting, report: Report, steps: int) -> None:
    """The UNet of Stable Diffusion 1.5 at 512 px, around it a toy's scheduler, tokenizer and VAE, which are not timed."""
    dtype = torch.float16 if setting.cuda else torch.float32
    pipe = toys.sd()
    if not setting.tiny:
        unet, _ = bench.sd15(setting.device)
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(pipe.tokenizer), hidden_size=768, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=12,
            max_position_embeddings=77, bos_token_id=pipe.tokenizer.bos_token_id, eos_token_id=pipe.tokenizer.eos_token_id))
        pipe = StableDiffusionPipeline(**{**pipe.components, "unet": unet, "text_encoder": text.eval().requires_grad_(False)},
                                       requires_safety_checker=False)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, setting.device, dtype)  # the pipeline's own `to` warns, of nothing
    words, categories = ("the fox", "the owl", "the moon"), ("character", "character", "place")
    with TemporaryDirectory() as folder, Engine(backbones.of(pipe, "sd"), "SD1.5 size") as engine:
        files = [bench.lora(pipe.unet, Path(folder) / f"{k}.safetensors", k) for k in range(3)]
        loras = [Lora(str(file), binds=binds, category=category) for file, binds, category in zip(files, words, categories, strict=True)]
        _arms(setting, report, engine, {
            name: Request("the fox and the owl on the moon", loras=loras, method=method, steps=steps, guidance=5.0, seed=7)
            for name, (method, _) in ARMS.items()})


def _arms(setting: Setting, report: Report, engine: Engine, requests: Mapping[str, Request]) -> None:
    """Rounds of all arms in turn, as many as the time allows; the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in requests}
    for turn in range(2 if setting.tiny else ROUNDS + 1):
        if report.left <= 0 and turn > 1:
            report.remark(f"{engine.name}: {turn - 1} rounds, for the time was up")
            break
        for name, asked in requests.items():
            seconds = _run(engine, asked, fold=ARMS[name][1])
            times[name] += [seconds] if turn else []
    bases = {base: times[base] for base in ("merge", "merge live")}
    for name, values in times.items():
        over = {f"over {base}": statistics.median(a / b for a, b in zip(values, bases[base], strict=True)) for base in bases}
        report.cell(f"{engine.name} {name}", {"ms a step": 1000 * statistics.median(values), **over})


def _run(engine: Engine, asked: Request, *, fold: bool) -> float:
    """Seconds a step, from the start of the first to the end of the last."""
    marks, backbone = clock.Marks(engine.device), engine.backbone

    def start(*args):
        latents, timesteps = type(backbone).start(backbone, *args)
        marks.mark()
        return latents, timesteps

    backbone.start, before = start, engine.fold
    try:
        engine.fold = fold
        with engine.group():
            engine.run(replace(asked, steps=1))  # encodes the prompts of this method and, where it may, folds
            marks.points.clear()
            engine.run(asked, on_step=lambda event: marks.mark())
    finally:
        engine.fold = before
        del backbone.start
    return sum(marks.spans()) / (len(marks.points) - 1)
