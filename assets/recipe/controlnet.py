"""The controlnet stage: a small ControlNet (arXiv 2302.05543) for the first base that reads the edges of a picture.

It begins as the outer half of the base's own denoiser without its attention, and learns on drawn scenes while the base stays as it
is. Most edges are the annotator's; the others are Canny's between thresholds drawn anew for every picture, so that any will do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from composition import Condition, Engine, Refused, Request, annotators
from composition.hooks.kernels import attention_for
from composition.loras import controls
from retrieval.judge import Judge

from .autoencoder import encoded
from .base import Noise
from .controlled import GUIDANCE, SLACK, STEPS, TEST, f1, interval
from .drawing import Pool, Stock, drawn_ahead
from .loop import Loop, Minutes
from .objects import article
from .tokenizer import ids
from .world import World, batch

ANNOTATOR, FOLDER = "canny", "controlnet-canny"
FIRST = 8 * 10**8  # number of the first scene that it is trained on
EMBEDDING = (8, 16, 32, 40)  # channels of what reads the edges, each half as fine as the one before
EMPTY = 0.25  # share of captions replaced by nothing: then the edges alone tell what is there
CENTRE, WIDTH = 1.2, 1.0  # ln sigma of the noise: edges settle where there is much of it
OWN = 0.75  # share of edges drawn by Medley's annotator
LOWER = (70, 140)  # of Canny's lower threshold in the others; the upper one is twice that


def build(unet: UNet2DConditionModel) -> ControlNetModel:
    """Untrained, its residuals zero: its residual blocks are the base's, without the attention between them.

    What reads the edges is not zero at its end, as the published one is, and keeps their size from layer to layer: it then learns
    in hundreds of steps what else takes thousands.
    """
    config = unet.config
    net = ControlNetModel(
        in_channels=config.in_channels, down_block_types=("DownBlock2D",) * len(config.block_out_channels), mid_block_type="UNetMidBlock2D",
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block, norm_num_groups=config.norm_num_groups,
        cross_attention_dim=config.cross_attention_dim, attention_head_dim=config.attention_head_dim,
        use_linear_projection=config.use_linear_projection, conditioning_embedding_out_channels=EMBEDDING,
    )  # fmt: skip
    held, own = unet.state_dict(), net.state_dict()
    net.load_state_dict(own | {name: held[name].float() for name in own if name in held and held[name].shape == own[name].shape})
    for name, module in net.controlnet_cond_embedding.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1) if name == "conv_out" else nn.init.kaiming_normal_(module.weight)
    return net


def edges(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """(h, w, 3) uint8 to (h, w) uint8: white lines, 255, on black."""
    if rng.random() < OWN:
        try:
            return np.asarray(annotators.annotate(ANNOTATOR, Image.fromarray(picture)))[..., 0]
        except Refused:
            pass  # of one colour
    lower = rng.uniform(*LOWER)
    return cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), lower, 2 * lower)


def stock(world: World, words: CLIPTokenizer, first: int, **sizes: int | None) -> Stock:
    """Pictures (size, size, 3) uint8, their edges (size, size) uint8 and their captions' tokens (L,) int16."""

    def draw(start: int, count: int) -> tuple[np.ndarray, ...]:
        pictures, captions = batch(world, start, count)
        lines = np.stack([edges(picture, random.Random(f"edges/{start + i}")) for i, picture in enumerate(pictures)])
        return pictures, lines, ids(words, captions).numpy().astype(np.int16)

    return Stock(draw, first=first, **sizes)


def hint(lines: torch.Tensor) -> torch.Tensor:
    """(B, h, w) uint8 to what a ControlNet is given, (B, 3, h, w) in 0..1."""
    return (lines.float() / 255)[:, None].expand(-1, 3, -1, -1).contiguous()


class Controlled:
    """The frozen base with the ControlNet on it."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel, net: ControlNetModel, empty: torch.Tensor, device: torch.device):
        """empty: tokens (1, L) of the caption that says nothing."""
        self.unet = unet.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
        self.text = text.to(device).requires_grad_(False).eval()
        self.net, self.noise, self.empty = net, Noise(device, CENTRE, WIDTH), empty

    def loss(self, latents: torch.Tensor, lines: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of v, a mean square. latents (B, C, h, w) half; lines (B, size, size) uint8; tokens (B, L)."""
        t = self.noise.steps(len(latents))
        noisy, v = self.noise.mix(latents.float(), t)
        noisy = noisy.to(memory_format=torch.channels_last)
        dropped = torch.rand(len(tokens), 1, device=tokens.device) < EMPTY
        with torch.autocast(latents.device.type, torch.bfloat16):
            words = self.text(torch.where(dropped, self.empty, tokens.long())).last_hidden_state
            down, mid = self.net(noisy, t, words, hint(lines), return_dict=False)
            guess = self.unet(noisy, t, words, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False)[0]
        return F.mse_loss(guess.float(), v)


def hidden(name: str) -> bool:
    """Weights for Muon: kernels and matrices but the first layers and the zero convolutions at the end."""
    return not any(part in name for part in ("conv_in", "controlnet_", "embedding"))


def train(world: World, base: Path, work: Path, out: Path, *, minutes: Minutes, device: torch.device, size: int = 16,
          workers: int = 0) -> ControlNetModel:  # fmt: skip
    """Train or resume from ``work/controlnet.pt`` on the base's folder, and write ``out``, in half precision."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet", dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32).requires_grad_(False).eval()
    words = CLIPTokenizer.from_pretrained(base / "tokenizer")
    net = build(unet)
    scenes = stock(world, words, FIRST + Loop.reached(work / "controlnet.pt"))
    with drawn_ahead([scenes], workers), attention_for(device, positions=unet.config.sample_size**2, gradients=True):
        vae.to(device, memory_format=torch.channels_last)
        net.to(device, memory_format=torch.channels_last)
        both = Controlled(unet, text, net, ids(words, [""]).to(device), device)
        enter: Callable[..., tuple[torch.Tensor, ...]] = lambda pictures, lines, tokens: (encoded(vae, pictures), lines, tokens)  # noqa: E731
        pool = Pool(scenes, device, limit=16_384, enter=enter)
        loop = Loop(net, work / "controlnet.pt", minutes=minutes, peak=2e-3, cool=0.5, average=0.99, hidden=hidden)
        loop.run(pool.batches(size), both.loss)
    with loop.averaged():
        print(f"controlnet: {loop.seen} pictures, {sum(p.numel() for p in net.parameters())} weights", flush=True)
        save(net, out)
    return net.eval()


def save(net: nn.Module, folder: Path) -> None:
    """Write a folder that stock diffusers opens, in half precision; the weights stay as they are. Its file names the annotator."""
    half = ControlNetModel.from_config(net.config)
    half.load_state_dict(net.state_dict())
    half.to(torch.float16).save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt", controls.ANNOTATOR: ANNOTATOR})
        file.chmod(0o644)


def figures(engine: Engine, judge: Judge, world: World, folder: Path, count: int = 100, sheet: Path | None = None) -> dict[str, Any]:
    """Pictures of scenes that were never trained on, one or two objects each, from one seed without and with the scene's edges.

    The F1 score of their edges against the scene's, pixel for pixel and within SLACK, and the share that holds all objects of the prompt, each
    with the bounds of its 95 % bootstrap interval. sheet: a picture of some: the scene, its edges, without, with.
    """
    scores: dict[str, list[float]] = {}
    rows, own = [], list(world.objects)
    for number in range(count):
        rng = random.Random(f"controlnet/{number}")
        names = rng.sample(own, rng.choice((1, 2)))
        scene = world.scene(TEST + number, names=names)
        lines = annotators.annotate(ANNOTATOR, Image.fromarray(scene.picture))
        with TemporaryDirectory() as held:
            lines.save(path := Path(held) / "edges.png")
            asked = Request(scene.caption, steps=STEPS, guidance=GUIDANCE, seed=number)
            control = Condition(str(folder), str(path), annotator="")
            pictures = [engine.run(request).images[0] for request in (asked, replace(asked, conditions=[control]))]
        present = judge.present([Image.fromarray(scene.picture), *pictures], [article(name) for name in names]).all(1).tolist()
        for label, picture, there in zip(("without", "with"), pictures, present[1:], strict=True):
            try:
                seen = annotators.annotate(ANNOTATOR, picture)
            except Refused:
                seen = Image.new("RGB", picture.size)
            for name, slack in (("F1", 0), (f"F1 within {SLACK:g}", max(1, round(SLACK * min(picture.size))))):
                scores.setdefault(f"{name} {label}", []).append(f1(seen, lines, slack))
            scores.setdefault(f"objects present {label}", []).append(float(there))
        scores.setdefault("objects present in the scenes", []).append(float(present[0]))
        rows.append(np.concatenate([scene.picture, *(np.asarray(picture) for picture in (lines, *pictures))], 1))
    if sheet is not None:
        Image.fromarray(np.concatenate(rows[:12])).save(sheet)
    return {"pictures": count} | {name: interval(values) for name, values in scores.items()}
