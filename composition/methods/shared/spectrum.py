"""How much of a latent lies in its high frequencies: the quantity CMLoRA orders LoRAs by (arXiv 2502.04923, section 3).

H = mean over radii r >= r_cut of p(r) / max p, where p(r) is the mean amplitude of the centred 2-D spectrum of the channel-mean
latent at distance r (rounded down) from its centre, and r_cut = 0.2 R_max. White noise has H near 0.6, a smooth latent near 0.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

CUT = 0.2  # of the largest radius


def high(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """H of each picture's latent, 0 to 1, float32 on its device; 0 for a latent that is constant or a single point."""
    grey = latents.detach().float().mean(1)
    tall, wide = grey.shape[-2:]
    amplitude = torch.fft.fftshift(torch.fft.fft2(grey), dim=(-2, -1)).abs()
    radius = _radii(tall, wide, latents.device)
    rings = int(radius.max()) + 1
    count = torch.zeros(rings, device=latents.device).index_add(0, radius, torch.ones_like(radius, dtype=torch.float32))
    sums = amplitude.new_zeros(len(grey), rings).index_add(1, radius, amplitude.flatten(1))
    profile = sums[:, count > 0] / count[count > 0]
    least = torch.arange(rings, device=latents.device)[count > 0] >= cutoff_radius(tall, wide)
    peak = profile.amax(1, keepdim=True)
    share = torch.where(peak > 0, profile / peak.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    return share[:, least].mean(1) if bool(least.any()) else share.new_zeros(len(grey))


def cutoff_radius(tall: int, wide: int) -> int:
    """The radius from which frequencies count as high: 0.2 of the largest, at least 1, so that some always do."""
    return max(1, int(CUT * largest(tall, wide)))


def largest(tall: int, wide: int) -> int:
    """The largest radius of a spectrum of this size."""
    return max(1, math.isqrt((tall // 2) ** 2 + (wide // 2) ** 2))


def _radii(tall: int, wide: int, device: torch.device) -> Tensor:
    """Distance of each bin of a centred spectrum from its centre, rounded down, flattened."""
    down = torch.arange(tall, device=device) - tall // 2
    across = torch.arange(wide, device=device) - wide // 2
    return (down[:, None] ** 2 + across[None] ** 2).float().sqrt().long().flatten()
