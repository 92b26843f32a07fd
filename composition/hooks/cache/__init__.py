"""Feature caches with one slot per adapter: of a UNet's outer levels, and of a transformer's blocks after the first.

What belongs here: what a denoiser may skip because a neighbouring step computed nearly the same. What does not: when a
method uses it. May import composition.hooks.costs.
"""

from typing import Any

from composition.hooks.cache.base import Cache, abandon
from composition.hooks.cache.transformer import ResidualCache
from composition.hooks.cache.unet import FeatureCache

__all__ = ["Cache", "FeatureCache", "ResidualCache", "abandon", "of"]


def of(denoiser: Any) -> Cache:
    """The cache that fits this denoiser: a UNet's or a transformer's."""
    return FeatureCache(denoiser) if hasattr(denoiser, "down_blocks") else ResidualCache(denoiser)
