"""A pool of synthetic LoRAs whose updates and captions follow a hidden vector of their concept: what an encoder can be trained on in seconds."""

import torch

from composition.loras.kinds.lora import Factors

SHAPES = {f"unet.{side}_blocks.{index}.attentions.0.transformer_blocks.0.attn2.to_{part}": (20, 16)
          for side in ("down", "up") for index in (0, 1) for part in ("k", "v")}  # fmt: skip
HIDDEN, TEXT = 8, 12


class Pool:
    """Each layer's update is one rank that says what the concept is, and two that say nothing, in a random basis of the ranks."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.rng, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.layers = {name: (self.normal(HIDDEN, out), self.normal(inputs)) for name, (out, inputs) in SHAPES.items()}
        self.words = self.normal(HIDDEN, TEXT)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.rng, dtype=torch.float64).to(self.dtype)

    def lora(self, concept: torch.Tensor, noise: float = 0.7, extra: int = 2) -> dict[str, Factors]:
        factors = {}
        for name, (up, down) in self.layers.items():
            ups = torch.cat([(concept @ up / HIDDEN**0.5)[None], noise * self.normal(extra, up.shape[1])]).T
            downs = torch.cat([down[None], noise * self.normal(extra, len(down))])
            turn = self.normal(extra + 1, extra + 1) + 2 * torch.eye(extra + 1, dtype=self.dtype)
            factors[name] = Factors(torch.linalg.inv(turn) @ downs, ups @ turn, None)
        return factors

    def caption(self, concept: torch.Tensor) -> torch.Tensor:
        return concept @ self.words / HIDDEN**0.5 + 0.1 * self.normal(TEXT)
