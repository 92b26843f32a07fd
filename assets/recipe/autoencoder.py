"""The autoencoder stage: 128 px pictures to 16x16 latents and back, a stock AutoencoderKL.

Noise in proportion to each channel's spread is added to the latents while training, so the decoder forgives the
denoiser's errors. At the end the channels are turned to their principal axes inside the 1x1 convolutions that stock code
already has, coarse before fine, and the fine ones are kept quieter: the denoiser then settles shapes before details.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from .drawing import Pool, Stock, drawn_ahead
from .loop import Loop, Minutes
from .objects import HELD_OBJECTS, OBJECTS, WORN
from .places import HELD_PLACES, PLACES
from .styles import STYLES
from .world import World

NOISE = 0.1  # of a channel's spread, while training
FRESH = 10**9  # scene numbers from here on are never trained on


def build(size: int, channels: int = 32, blocks: tuple[int, ...] = (24, 48, 96, 128)) -> AutoencoderKL:
    """Untrained, every residual block beginning as the identity."""
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=blocks, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(blocks), up_block_types=("UpDecoderBlock2D",) * len(blocks),
        norm_num_groups=8, sample_size=size, scaling_factor=1.0, force_upcast=False, mid_block_add_attention=False,
    )  # fmt: skip
    for name, module in vae.named_modules():
        if name.rsplit(".", 1)[-1] == "conv2" and "resnets" in name:
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return vae


def tensor(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(B, size, size, 3) uint8 to (B, 3, size, size) in -1..1, on the same device, channels last in memory."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss_of(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE + 0.5 edge differences, in -1..1 units; x (B, 3, size, size)."""
    with torch.autocast(x.device.type, torch.bfloat16):
        z = vae.encode(x).latent_dist.mean
    return decoded_loss(vae, x, z, torch.full((len(x), 1, 1, 1), NOISE, device=x.device))


def decoded_loss(vae: AutoencoderKL, x: torch.Tensor, z: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The same from latents z (B, C, h, w); share (B, 1, 1, 1) of a channel's spread is added to them as noise."""
    spread = z.detach().float().std((0, 2, 3), keepdim=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = vae.decode(z + share * spread * torch.randn_like(z, dtype=torch.float32)).sample
    y = y.float()
    sharp = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
    return (x - y).abs().mean() + 2 * ((x - y) ** 2).mean() + 0.5 * sharp


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """dB of (n, size, size, 3) uint8, which were never trained on."""
    x = tensor(pictures).to(vae.device)
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(64)])
    error = (((x - y.clamp(-1, 1)) / 2) ** 2).flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def settle(vae: AutoencoderKL, wide: World, count: int = 2048) -> None:
    """Turn the channels to their principal axes, in place: mean 0, spread the root of what it was, a mean square of 1.

    The turn is folded into quant_conv, its inverse into post_quant_conv; the noise head is shut.
    """
    z = torch.cat([vae.encode(tensor(some(wide, FRESH + 10_000 + i, 64)).to(vae.device)).latent_dist.mean
                   for i in range(0, count, 64)])  # fmt: skip
    z = z.permute(0, 2, 3, 1).flatten(0, 2).double()
    mean, c, enter, leave = z.mean(0), z.shape[1], vae.quant_conv, vae.post_quant_conv
    variance, axes = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    variance, axes = variance.flip(0), axes.flip(1)
    scale = variance ** -0.25 / variance.sqrt().mean().sqrt()  # spreads become variance ** 0.25, mean square 1
    turn, back = (axes * scale).T, axes / scale
    matrix = enter.weight[:c, :, 0, 0].double()
    enter.weight[:c, :, 0, 0] = (turn @ matrix).float()
    enter.bias[:c] = (turn @ (enter.bias[:c].double() - mean)).float()
    enter.weight[c:], enter.bias[c:] = 0, -20  # log variance: the sample is the mean
    matrix = leave.weight[:, :, 0, 0].double()
    leave.bias += (matrix @ mean).float()
    leave.weight[:, :, 0, 0] = (matrix @ back).float()


def wide_world(art: str | Path, size: int, vendors: Sequence[str], grounds: Mapping[str, np.ndarray] | None = None) -> World:
    """Everything there is to draw, held-out concepts too: the autoencoder must handle all of it."""
    return World(art, objects=len(OBJECTS), places=len(PLACES), size=size, vendors=vendors,
                 also=[*HELD_OBJECTS, *WORN, *HELD_PLACES], variants=40, grounds=grounds)  # fmt: skip


def anything(wide: World, seed: int) -> np.ndarray:
    """A scene with any object in any place, some wearing something, a third of them in a style: (size, size, 3) uint8."""
    rng = random.Random(seed)
    subject, place = rng.choice([*OBJECTS, *HELD_OBJECTS]), rng.choice([*PLACES, *HELD_PLACES])
    picture = wide.scene(seed, subject=subject, place=place, wears=rng.choice([None] * 8 + list(WORN))).picture
    return rng.choice(list(STYLES.values()))[1](picture) if rng.random() < 0.33 else picture


def some(wide: World, first: int, count: int) -> np.ndarray:
    """(count, size, size, 3) uint8."""
    return np.stack([anything(wide, first + i) for i in range(count)])


def stock(wide: World, first: int, **sizes: int | None) -> Stock:
    """Pictures (size, size, 3) uint8 never seen before."""
    return Stock(lambda start, count: (some(wide, start, count),), first=first, **sizes)


def train(wide: World, work: Path, *, minutes: Minutes, device: torch.device, size: int = 16, workers: int = 0,
          compiled: bool = True) -> AutoencoderKL:  # fmt: skip
    """Train or resume, settle the latents, and save to ``work/vae``; returns it in fp32."""
    vae = build(wide.size)
    pool = Pool(stock(wide, Loop.reached(work / "vae.pt")), device, limit=16_384)
    step = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    with drawn_ahead([pool.stock], workers):
        vae = vae.to(device, memory_format=torch.channels_last)
        loop = Loop(vae, work / "vae.pt", minutes=minutes, peak=2e-3, cool=0.6, average=0.995)
        loop.run(pool.batches(size), lambda x: step(vae, tensor(x)))
    with loop.averaged():
        fresh = some(wide, FRESH, 256)
        print(f"autoencoder: {loop.seen} pictures, {psnr(vae, fresh):.2f} dB on fresh scenes", flush=True)
        settle(vae, wide)
        print(f"autoencoder, settled: {psnr(vae, fresh):.2f} dB", flush=True)
        vae.save_pretrained(work / "vae")
    return AutoencoderKL.from_pretrained(work / "vae").to(device)


def inner(name: str) -> bool:
    """Weights of the decoder for Muon: all kernels but the first and the last."""
    return "conv_in" not in name and "conv_out" not in name


def polish(vae: AutoencoderKL, pool: Pool, work: Path, *, minutes: Minutes, device: torch.device, size: int = 16,
           compiled: bool = True) -> Loop:  # fmt: skip
    """Train the decoder further while the latents stay as they are, so that a base trained on them stays valid.

    The pool's rows are pictures with their latents (`with_latents`). Their noise is from none to that of the training, since a
    picture that nothing generated has none. Returns the loop; ``vae`` then has its averaged weights.
    """
    vae.requires_grad_(False).to(device, memory_format=torch.channels_last)
    vae.decoder.requires_grad_(True)
    step = torch.compile(decoded_loss, dynamic=False) if compiled else decoded_loss
    loop = Loop(vae, work / "polish.pt", minutes=minutes, peak=1e-3, cool=0.6, average=0.995, hidden=inner)

    def loss(pictures: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        share = NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        return step(vae, tensor(pictures), latents.float(), share)

    loop.run(pool.batches(size), loss)
    loop.averaged().__enter__()
    return loop


def with_decoder(folder: Path, file: Path) -> None:
    """Put the decoder of a safetensors file into the folder of an autoencoder, in half precision."""
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float16)
    vae.load_state_dict(vae.state_dict() | load_file(file))
    vae.save_pretrained(folder)


def with_latents(vae: AutoencoderKL, stock: Stock, device: torch.device, limit: int = 16_384) -> Pool:
    """Pictures (B, size, size, 3) uint8 and their latents (B, C, h, w) in half precision, for `polish`."""
    return Pool(stock, device, limit=limit, enter=lambda x: (x, encoded(vae, x)), seen=2)


def encoded(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """(B, size, size, 3) uint8 to latents (B, C, h, w) in half precision."""
    with torch.no_grad(), torch.autocast(pictures.device.type, torch.bfloat16):
        return vae.encode(tensor(pictures)).latent_dist.mean.half().contiguous()
