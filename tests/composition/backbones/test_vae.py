"""One scaling of the autoencoder's numbers, used there and back, for every kind of configuration."""

from types import SimpleNamespace

import pytest
import torch

from composition.backbones import vae
from composition.backbones.encodings import FEWEST, Encodings
from composition.backbones.unet import UNetBackbone
from composition.training.concept import latents_of
from tests import toys
from tests.composition.devices import offloading
from tests.composition.devices.pretended import pretended

CONFIGS = {
    "sd": ({"scaling_factor": 0.18215}, lambda x: x * 0.18215),
    "flux": ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, lambda x: (x - 0.1159) * 0.3611),
    "means": ({"scaling_factor": 0.5, "latents_mean": [1.0, -2.0], "latents_std": [2.0, 4.0]},
              lambda x: torch.stack([(x[:, 0] - 1) / 2, (x[:, 1] + 2) / 4], 1) * 0.5),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_scaled_is_what_the_configuration_says_and_unscaled_its_inverse(kind):
    config, expected = CONFIGS[kind]
    autoencoder = SimpleNamespace(config=SimpleNamespace(**config))
    coded = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    latents = vae.scaled(autoencoder, coded)
    torch.testing.assert_close(latents, expected(coded), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vae.unscaled(autoencoder, latents), coded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offload", ["none", "model"])
def test_pictures_are_encoded_where_the_pipeline_computes(offload):
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = latents_of(UNetBackbone(toys.sd(), "sd"), pixels, part=2)
    with pretended() as device:
        pipe = toys.sd()
        backbone = UNetBackbone(pipe, "sd", offloading.place(pipe, offload))
        latents = latents_of(backbone, pixels, part=2)
        assert latents.device == device
        torch.testing.assert_close(latents.cpu(), expected, rtol=0, atol=1e-6)


def test_encodings_are_bounded_in_bytes_and_keep_what_was_asked_for():
    kept = Encodings(limit=20 * 400)
    for number in range(40):
        assert 0 not in kept or number, "asked for at every turn"
        kept.update({number: torch.zeros(100)})
        assert kept.bytes <= 20 * 400
    assert 0 in kept and 39 in kept and 1 not in kept and len(kept) == 20
    small = Encodings(limit=1)
    small.update({("value", part): torch.zeros(100) for part in range(3)})
    assert all(("value", part) in small for part in range(3)), "a prompt that is being read stays whole"
    for number in range(20):
        small.update({number: torch.zeros(100)})
    assert len(small) == FEWEST
