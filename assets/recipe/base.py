"""The base stage: text encoder and denoiser trained together on settled latents, v-prediction.

Latents are encoded once into a pool whose oldest part is replaced after every round, so the denoiser sees a scene a few
times and then never again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from composition.training.attention import plain_attention

from .autoencoder import tensor
from .loop import Loop
from .tokenizer import LENGTH, ids
from .world import World, batch

APART = 10**8  # scene numbers between two processes that train together
EMPTY = 0.1  # share of captions replaced by nothing, for guidance
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


def build_unet(channels: int, side: int, text_width: int, blocks: tuple[int, ...] = (64, 160)) -> UNet2DConditionModel:
    """Attention at every level but the finest, whose positions are many; heads of 32; residual blocks begin as the identity."""
    count = len(blocks)
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=blocks, layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (count - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (count - 1), "UpBlock2D"),
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


class Pool:
    """Scenes encoded with the frozen autoencoder: latents (n, C, h, w) half precision and what ``read`` makes of captions (n, L)."""

    def __init__(self, world: World, vae: AutoencoderKL, read: Callable[[list[str]], torch.Tensor], *, first: int, limit: int = 98_304):
        self.world, self.vae, self.read, self.next, self.limit = world, vae, read, first, limit
        self.latents: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, count: int, part: int = 256) -> None:
        """Encode ``count`` new scenes; beyond the limit the oldest go."""
        for _ in range(0, count, part):
            pictures, captions = batch(self.world, self.next, part)
            x = tensor(pictures).to(self.vae.device, memory_format=torch.channels_last)
            with torch.autocast(x.device.type, torch.bfloat16):
                z = self.vae.encode(x).latent_dist.mean
            self.latents.append(z.half().contiguous())
            self.tokens.append(self.read(captions).to(x.device))
            self.next += part
        while len(self.latents) * part > self.limit:
            del self.latents[0], self.tokens[0]

    def batches(self, size: int, start: int, refresh: int, rounds: int = 512) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless (latents, tokens), ``rounds`` batches between refreshes."""
        self.add(start)
        empty = self.read([""]).to(self.vae.device)
        while True:
            latents, tokens = torch.cat(self.latents), torch.cat(self.tokens)
            for _ in range(rounds):
                pick = torch.randint(len(latents), (size,), device=latents.device)
                dropped = torch.rand(size, 1, device=latents.device) < EMPTY
                yield latents[pick].float(), torch.where(dropped, empty, tokens[pick])
            self.add(refresh)


class Noise:
    """Draws timesteps as the base trains on them and mixes noise in."""

    def __init__(self, device: torch.device):
        self.kept = scheduler().alphas_cumprod.to(device)
        self.log_sigma = (((1 - self.kept) / self.kept) ** 0.5).log()

    def steps(self, count: int) -> torch.Tensor:
        """(B,) timesteps: ln sigma normal, a tenth uniform over the steps."""
        drawn = torch.searchsorted(self.log_sigma, torch.randn(count, device=self.kept.device) * WIDTH + CENTRE)
        even = torch.randint(len(self.kept), (count,), device=self.kept.device)
        return torch.where(torch.rand(count, device=self.kept.device) < 0.1, even, drawn.clamp(max=len(self.kept) - 1))

    def mix(self, latents: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents and the v they should be answered with, both (B, C, h, w)."""
        noise, kept = torch.randn_like(latents), self.kept[t][:, None, None, None]
        a, s = kept.sqrt(), (1 - kept).sqrt()
        return a * latents + s * noise, a * noise - s * latents


def predict(unet: UNet2DConditionModel, noisy, t, hidden) -> torch.Tensor:
    return unet(noisy, t, hidden, return_dict=False)[0]


def train(world: World, vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, *, minutes: float, device: torch.device,
          size: int = 64, average: float = 0.998,
          blocks: tuple[int, ...] = (64, 160), start: int = 24_576, refresh: int = 4_096,
          begin: Path | None = None) -> Denoiser:  # fmt: skip
    """Train or resume; the checkpoint is ``work/base.pt``. Returns the averaged weights.

    begin: a Pocket folder whose text encoder a new training begins with, in place of a random one.
    """
    vae = vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    model = build(vae, tokenizer, blocks)
    if begin is not None:
        held = CLIPTextModel.from_pretrained(begin / "text_encoder", dtype=torch.float32)
        model.text.load_state_dict(held.state_dict())
    model.to(device)
    model.unet.to(memory_format=torch.channels_last)
    loop = Loop(model, work / "base.pt", minutes=minutes, peak=1.5e-3, cool=0.35, average=average, hidden=hidden)
    pool = Pool(world, vae, partial(ids, tokenizer), first=loop.seen + loop.rank * APART)
    noise = Noise(device)
    compiled = torch.compile(predict, dynamic=False)

    def loss_of(latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        t = noise.steps(len(latents))
        noisy, v = noise.mix(latents, t)
        noisy = noisy.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.text(tokens).last_hidden_state
            guess = compiled(model.unet, noisy, t, hidden)
        return F.mse_loss(guess.float(), v)

    with plain_attention(device, model.unet.config.sample_size**2):
        loop.run(pool.batches(size, start, refresh), loss_of)
    loop.averaged().__enter__()
    return model


def build(vae: AutoencoderKL, tokenizer: CLIPTokenizer, blocks: tuple[int, ...]) -> Denoiser:
    """Untrained, of the autoencoder's latent size."""
    text = build_text(tokenizer)
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    return Denoiser(build_unet(vae.config.latent_channels, side, text.config.hidden_size, blocks), text)


def trained(vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, blocks: tuple[int, ...]) -> tuple[Denoiser, dict]:
    """The averaged weights of the checkpoint, while training goes on elsewhere, and what it says of its cost."""
    model = build(vae, tokenizer, blocks)
    held = torch.load(work / "base.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for weight, value in zip([p for p in model.parameters() if p.requires_grad], held["smooth"], strict=True):
            weight.copy_(value)
    return model.eval(), {"pictures": held["seen"], "minutes": math.ceil(held["elapsed"] / 60)}
