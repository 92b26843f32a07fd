"""The first noise is one and the same in every number type, rounding apart."""

import pytest
import torch

from composition import Request, backbones
from composition.backbones import pipeline, schedulers
from tests.composition.conftest import FAMILIES


def start(family, dtype):
    backbone = backbones.of(FAMILIES[family](dtype=dtype), family.removesuffix("-dev"))
    request = Request("a", seed=5, steps=2).settled(*backbone.defaults)
    scheduler = schedulers.make("default", backbone.scheduler, request.steps)
    return backbone.start(request, scheduler, [torch.Generator().manual_seed(seed) for seed in (5, 6)])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_rounds_the_noise_of_single(family):
    wide, narrow = start(family, torch.float32), start(family, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-6, atol=2**-6)


def test_noise_is_never_drawn_in_half_precision(monkeypatch):
    drawn, honest = [], pipeline.randn_tensor
    monkeypatch.setattr(pipeline, "randn_tensor", lambda *a, dtype, **k: drawn.append(dtype) or honest(*a, dtype=dtype, **k))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        start("sd", dtype)
    assert drawn == [torch.float32, torch.float32, torch.float64]
