"""How a family mixes noise into latents, at which times, and what it should answer: diffusion or rectified flow."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Num
from torch import Generator, Tensor

from composition.refusal import Refused


@runtime_checkable
class Noise(Protocol):
    def times(self, size: int, spread: tuple[float, float] | None, generator: Generator) -> Num[Tensor, "rows"]:
        """The denoiser's times. spread: (centre, width) of ln sigma's normal distribution, besides a tenth evenly; None: usual."""
        ...

    def mix(
        self, latents: Float[Tensor, "rows C H W"], noise: Float[Tensor, "rows C H W"], t: Num[Tensor, "rows"]
    ) -> tuple[Float[Tensor, "rows C H W"], Float[Tensor, "rows C H W"]]:
        """(noisy latents, what the denoiser should answer to them)."""
        ...


def of(scheduler: Any) -> Noise:
    """As this scheduler's model was trained. Raises Refused for what it predicts when that is not known."""
    return Diffusion(scheduler) if hasattr(scheduler, "alphas_cumprod") else Flow()


class Diffusion:
    """a latents + s noise with a^2 + s^2 = 1, at whole time steps; None draws them evenly."""

    def __init__(self, scheduler: Any) -> None:
        self.kept = scheduler.alphas_cumprod.double().cpu()
        self.log_sigma = ((1 - self.kept) / self.kept).sqrt().log()
        self.kind = scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise Refused(f"this base predicts {self.kind!r}; concepts can be trained on epsilon, v_prediction, sample")

    def times(self, size: int, spread: tuple[float, float] | None, generator: Generator) -> Num[Tensor, "rows"]:
        even = torch.randint(len(self.kept), (size,), generator=generator)
        if spread is None:
            return even
        wanted = torch.randn(size, generator=generator, dtype=torch.float64) * spread[1] + spread[0]
        drawn = torch.searchsorted(self.log_sigma, wanted).clamp(max=len(self.kept) - 1)
        return torch.where(torch.rand(size, generator=generator) < 0.1, even, drawn)

    def mix(
        self, latents: Float[Tensor, "rows C H W"], noise: Float[Tensor, "rows C H W"], t: Num[Tensor, "rows"]
    ) -> tuple[Float[Tensor, "rows C H W"], Float[Tensor, "rows C H W"]]:
        kept = self.kept[t].to(latents.dtype).view(-1, 1, 1, 1)
        a, s = kept.sqrt(), (1 - kept).sqrt()
        goal = {"epsilon": noise, "v_prediction": a * noise - s * latents, "sample": latents}[self.kind]
        return a * latents + s * noise, goal.clone()


class Flow:
    """(1 - s) latents + s noise at time 1000 s, answered by noise - latents; None draws s logit-normally (Esser et al. 2024)."""

    def times(self, size: int, spread: tuple[float, float] | None, generator: Generator) -> Num[Tensor, "rows"]:
        centre, width = spread or (0.0, 1.0)
        drawn = (torch.randn(size, generator=generator, dtype=torch.float64) * width + centre).sigmoid()
        even = torch.rand(size, generator=generator, dtype=torch.float64)
        uneven = drawn if spread is None else torch.where(torch.rand(size, generator=generator) < 0.1, even, drawn)
        return (1000 * uneven).float()

    def mix(
        self, latents: Float[Tensor, "rows C H W"], noise: Float[Tensor, "rows C H W"], t: Num[Tensor, "rows"]
    ) -> tuple[Float[Tensor, "rows C H W"], Float[Tensor, "rows C H W"]]:
        s = (t / 1000).to(latents.dtype).view(-1, 1, 1, 1)
        return (1 - s) * latents + s * noise, noise - latents
