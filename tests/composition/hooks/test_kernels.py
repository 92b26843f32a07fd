"""Which kernels of attention are allowed: never cuDNN's where gradients are taken, and afterwards what was allowed before.

On a processor cuDNN's never runs; what is seen here is that it is switched off there, not what it computes.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.backends import cuda

from composition.hooks.kernels import FEW, attention_for
from composition.training.concept import train
from composition.training.plan import Plan
from tests import toys
from tests.composition import laws
from tests.composition.test_training import concept, toy

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KERNELS = {"cudnn": cuda.cudnn_sdp_enabled, "flash": cuda.flash_sdp_enabled, "efficient": cuda.mem_efficient_sdp_enabled, "plain": cuda.math_sdp_enabled}


def allowed():
    return {name for name, enabled in KERNELS.items() if enabled()}


@pytest.fixture(params=[True, False], ids=["cudnn allowed", "cudnn off"])
def before(request):
    """What is allowed at first."""
    kept = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(request.param)
    try:
        yield allowed()
    finally:
        cuda.enable_cudnn_sdp(kept)


@pytest.fixture
def seen(monkeypatch):
    """Of every attention that is computed: whether gradients were on, and whether cuDNN's kernel was allowed."""
    honest, calls = F.scaled_dot_product_attention, []

    def attention(*args, **more):
        calls.append((torch.is_grad_enabled(), cuda.cudnn_sdp_enabled()))
        return honest(*args, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return calls


@pytest.mark.parametrize("device, more, left", [
    (GPU, {}, set(KERNELS)), (GPU, {"gradients": True}, set(KERNELS) - {"cudnn"}), (GPU, {"positions": 64, "gradients": True}, set(KERNELS) - {"cudnn"}),
    (CPU, {}, set(KERNELS)), (CPU, {"gradients": True}, set(KERNELS) - {"cudnn"}), (CPU, {"positions": FEW}, {"plain"}),
    (CPU, {"positions": FEW, "gradients": True}, {"plain"}), (CPU, {"positions": FEW + 1, "gradients": True}, set(KERNELS) - {"cudnn"}),
])  # fmt: skip
def test_what_is_allowed_inside_and_afterwards(device, more, left, before):
    with attention_for(device, **more):
        assert allowed() == left & (before | {"plain"})
        with attention_for(device, **more):
            assert "cudnn" not in allowed() or not more
        assert allowed() == left & (before | {"plain"})
    assert allowed() == before
    with pytest.raises(OSError), attention_for(device, **more):
        raise OSError
    assert allowed() == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_training(checkpointing, tmp_path, seen, before):
    """In the backward pass, too, where it computes activations again."""
    backbone, adapters = toy(torch.float32, toys.flux)
    seen.clear()
    train(backbone, adapters, [concept("fox", dtype=torch.float32)], Plan(rank=2, steps=1, batch=1), tmp_path, checkpointing=checkpointing)
    adapters.close()
    with_gradients = [cudnn for gradients, cudnn in seen if gradients]
    assert len(with_gradients) == (2 if checkpointing else 1) * 4 and not any(with_gradients)
    assert allowed() == before


@pytest.mark.parametrize("two_phase", [True, False])
def test_in_cloras_gradient_alone(two_phase, engines, lora_files, seen, before, shapes_unchecked):
    options = {"maps": "attention", "until": 0.5, "rounds": 0, "stop": 0.0, "two_phase": two_phase}
    engines["flux"].run(laws.request("clora", *laws.loras_of(lora_files["flux"][:2]), options=options, steps=2))
    with_gradients = [cudnn for gradients, cudnn in seen if gradients]
    assert with_gradients and not any(with_gradients)
    assert all(cudnn == ("cudnn" in before) for gradients, cudnn in seen if not gradients)
    assert allowed() == before
