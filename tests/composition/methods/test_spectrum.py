"""H of a latent: numbers known beforehand, every size, no NaN."""

import numpy as np
import pytest
import torch

from composition.methods.shared import spectrum


def by_hand(grey):
    """Loops over bins, float64."""
    tall, wide = grey.shape
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(grey)))
    rings = {}
    for y in range(tall):
        for x in range(wide):
            rings.setdefault(int(np.sqrt((y - tall // 2) ** 2 + (x - wide // 2) ** 2)), []).append(amplitude[y, x])
    profile = {r: np.mean(values) for r, values in rings.items()}
    peak = max(profile.values())
    least = max(1, int(0.2 * int(np.sqrt((tall // 2) ** 2 + (wide // 2) ** 2))))
    return np.mean([value / peak for r, value in profile.items() if r >= least]) if peak else 0.0


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 16), (64, 64), (128, 96), (2, 2)])
def test_it_is_the_formula(size):
    latents = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(sum(size)))
    expected = [by_hand(one.mean(0).double().numpy()) for one in latents]
    assert spectrum.high(latents).tolist() == pytest.approx(expected, rel=1e-4)


def test_noise_is_high_and_smooth_is_low():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 4, 64, 64, generator=generator)
    assert float(spectrum.high(noise).mean()) > 0.5
    radius = torch.tensor([[max(1.0, ((y - 32) ** 2 + (x - 32) ** 2) ** 0.5) for x in range(64)] for y in range(64)])
    pink = torch.fft.fftshift(torch.fft.fft2(noise), dim=(-2, -1)) / radius**1.5
    smooth = torch.fft.ifft2(torch.fft.ifftshift(pink, dim=(-2, -1))).real
    assert float(spectrum.high(smooth).mean()) < 0.05


@pytest.mark.parametrize("size", [(side, side) for side in range(8, 24)] + [(1, 1), (8, 40), (45, 45), (128, 96)])
def test_there_is_a_number_at_every_size(size):
    for latents in (torch.randn(1, 4, *size), torch.zeros(1, 4, *size), torch.ones(1, 4, *size), torch.full((1, 4, *size), 1e-30)):
        found = spectrum.high(latents)
        assert torch.isfinite(found).all() and 0 <= float(found) <= 1


def test_the_cut_is_a_fifth_of_the_radius():
    assert spectrum.largest(64, 64) == 45 and spectrum.cutoff_radius(64, 64) == 9
    assert spectrum.largest(128, 96) == 80 and spectrum.cutoff_radius(128, 96) == 16
    assert spectrum.cutoff_radius(8, 8) == 1


def test_half_precision_and_batches():
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert spectrum.high(latents.half()).tolist() == pytest.approx(spectrum.high(latents).tolist(), abs=1e-3)
    assert spectrum.high(latents)[1] == spectrum.high(latents[1:])[0]
