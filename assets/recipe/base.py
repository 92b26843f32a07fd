"""The base stage: text encoder and denoiser trained together on settled latents, v-prediction.

Scenes are encoded once into a pool whose oldest give way to new ones, so the denoiser sees a scene a few times and then never
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from composition.hooks.kernels import attention_for

from .autoencoder import encoded
from .drawing import SEEN, Pool, Stock, drawn_ahead
from .loop import Loop, Minutes, joined
from .tokenizer import LENGTH, ids
from .world import World, batch

APART = 10**8  # scene numbers between two processes that train together
EMPTY = 0.1  # share of captions replaced by nothing, for guidance
BLOCKS = (96, 192)  # widths of the denoiser's levels
CENTRE, WIDTH = 0.0, 1.1  # ln sigma of the noise trained on: normal, besides a tenth spread evenly over the steps


def scheduler() -> DDIMScheduler:
    """The noise levels trained on; other stock schedulers are made from its config. The last sigma is about 64."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=True, steps_offset=1, prediction_type="v_prediction",
                         timestep_spacing="trailing")  # fmt: skip


def build_text(tokenizer: CLIPTokenizer, width: int = 192, layers: int = 2) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=width, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def build_unet(channels: int, side: int, text_width: int, blocks: tuple[int, ...] = BLOCKS, fine: bool = True) -> UNet2DConditionModel:
    """Attention at every level; not ``fine``: at every one but the finest. Heads of 32; residual blocks begin as the identity."""
    rest, finest = len(blocks) - 1, ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D") if fine else ("DownBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=blocks, layers_per_block=1,
        down_block_types=(finest[0], *("CrossAttnDownBlock2D",) * rest),
        up_block_types=(*("CrossAttnUpBlock2D",) * rest, finest[1]),
        cross_attention_dim=text_width, attention_head_dim=tuple(b // 32 for b in blocks), norm_num_groups=16,
        use_linear_projection=True,
    )  # fmt: skip
    for name, module in unet.named_modules():
        if name.rsplit(".", 1)[-1] in ("conv2", "proj_out", "conv_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def hidden(name: str) -> bool:
    """Weights for Muon: all matrices but the embeddings and the UNet's first and last layer."""
    return not any(part in name for part in ("embedding", "conv_in", "unet.conv_out"))


class Denoiser(nn.Module):
    """What is trained: text encoder and UNet as one."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel):
        super().__init__()
        self.unet, self.text = unet, text


def stock(world: World, read: Callable[[list[str]], torch.Tensor], first: int, **sizes: int | None) -> Stock:
    """Scenes of the world: pictures (size, size, 3) uint8, and what ``read`` makes of their captions, (L,) int16."""

    def draw(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        pictures, captions = batch(world, start, count)
        return pictures, read(captions).numpy().astype(np.int16)

    return Stock(draw, first=first, **sizes)


def latents_pool(stock: Stock, vae: AutoencoderKL, device: torch.device, limit: int = 98_304, seen: float = SEEN) -> Pool:
    """Latents (n, C, h, w) in half precision and tokens (n, L) of the stock's scenes; each is used ``seen`` times."""
    return Pool(stock, device, limit=limit, enter=lambda pictures, tokens: (encoded(vae, pictures), tokens), seen=seen)


def drop_captions(batches: Iterator[tuple[torch.Tensor, ...]], empty: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same (latents (B, C, h, w), tokens (B, L)) with a share of the captions replaced by ``empty`` (1, L)."""
    for latents, tokens in batches:
        dropped = torch.rand(len(tokens), 1, device=tokens.device) < EMPTY
        yield latents.float(), torch.where(dropped, empty, tokens.long())


class Noise:
    """Draws timesteps as the base trains on them and mixes noise in. centre, width: of ln sigma."""

    def __init__(self, device: torch.device, centre: float = CENTRE, width: float = WIDTH):
        self.centre, self.width = centre, width
        self.kept = scheduler().alphas_cumprod.to(device)
        self.log_sigma = (((1 - self.kept) / self.kept) ** 0.5).log()

    def steps(self, count: int) -> torch.Tensor:
        """(B,) timesteps: ln sigma normal, a tenth uniform over the steps."""
        drawn = torch.searchsorted(self.log_sigma, torch.randn(count, device=self.kept.device) * self.width + self.centre)
        even = torch.randint(len(self.kept), (count,), device=self.kept.device)
        return torch.where(torch.rand(count, device=self.kept.device) < 0.1, even, drawn.clamp(max=len(self.kept) - 1))

    def mix(self, latents: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents and the v to predict for them, both (B, C, h, w)."""
        noise, kept = torch.randn_like(latents), self.kept[t][:, None, None, None]
        a, s = kept.sqrt(), (1 - kept).sqrt()
        return a * latents + s * noise, a * noise - s * latents


def predict(unet: UNet2DConditionModel, noisy, t, hidden) -> torch.Tensor:
    return unet(noisy, t, hidden, return_dict=False)[0]


def train(world: World, vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, *, minutes: Minutes, device: torch.device,
          size: int = 64, average: float = 0.998, blocks: tuple[int, ...] = BLOCKS, fine: bool = True, begin: Path | None = None,
          workers: int = 0, compiled: bool = True) -> Denoiser:  # fmt: skip
    """Train or resume; the checkpoint is ``work/base.pt``. Returns the averaged weights.

    begin: a Pocket folder whose text encoder a new training begins with, in place of a random one.
    """
    model, read = build(vae, tokenizer, blocks, fine), partial(ids, tokenizer)
    if begin is not None:
        held = CLIPTextModel.from_pretrained(begin / "text_encoder", dtype=torch.float32)
        model.text.load_state_dict(held.state_dict())
    scenes = stock(world, read, first=Loop.reached(work / "base.pt") + joined()[0] * APART)
    with drawn_ahead([scenes], workers), attention_for(device, positions=model.unet.config.sample_size**2, gradients=True):
        model.to(device)
        model.unet.to(memory_format=torch.channels_last)
        vae = vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
        loop = Loop(model, work / "base.pt", minutes=minutes, peak=1.5e-3, cool=0.35, average=average, hidden=hidden)
        noise, call = Noise(device), torch.compile(predict, dynamic=False) if compiled else predict

        def loss_of(latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            t = noise.steps(len(latents))
            noisy, v = noise.mix(latents, t)
            noisy = noisy.to(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = model.text(tokens).last_hidden_state
                guess = call(model.unet, noisy, t, hidden)
            return F.mse_loss(guess.float(), v)

        pool = latents_pool(scenes, vae, device)
        loop.run(drop_captions(pool.batches(size), read([""]).to(device)), loss_of)
    loop.averaged().__enter__()
    return model


def build(vae: AutoencoderKL, tokenizer: CLIPTokenizer, blocks: tuple[int, ...] = BLOCKS, fine: bool = True) -> Denoiser:
    """Untrained, of the autoencoder's latent size."""
    text = build_text(tokenizer)
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    return Denoiser(build_unet(vae.config.latent_channels, side, text.config.hidden_size, blocks, fine), text)


def trained(vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, blocks: tuple[int, ...] = BLOCKS,
            fine: bool = True) -> tuple[Denoiser, dict]:  # fmt: skip
    """The averaged weights of the checkpoint, while training goes on elsewhere, and its cost so far."""
    model = build(vae, tokenizer, blocks, fine)
    held = torch.load(work / "base.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for weight, value in zip([p for p in model.parameters() if p.requires_grad], held["smooth"], strict=True):
            weight.copy_(value)
    return model.eval(), {"pictures": held["seen"], "minutes": math.ceil(held["elapsed"] / 60)}
