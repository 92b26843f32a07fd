"""The pretended device keeps the law of a device apart: it refuses what CUDA refuses, and allows what CUDA allows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import toys
from tests.composition.devices import offloading
from tests.composition.devices.pretended import DEVICE, move, pretended


@pytest.fixture
def device():
    with pretended() as known:
        yield known


@pytest.mark.parametrize("operation", [
    lambda a: a + torch.ones(4), lambda a: torch.ones(4) * a, lambda a: a.index_select(0, torch.tensor([0])),
    lambda a: torch.cat([a, torch.ones(1, 4)]), lambda a: F.linear(torch.ones(2, 4), a), lambda a: F.linear(a, torch.ones(2, 4)),
    lambda a: torch.where(a > 0, torch.zeros(4), a), lambda a: torch.ones(4)[torch.tensor([0]).to(DEVICE)],
    lambda a: torch.einsum("ij,kj->ik", a, torch.ones(2, 4)), lambda a: a.addmm_(torch.ones(3, 2), torch.ones(2, 4)),
])
def test_both_kinds_do_not_meet(device, operation):
    with pytest.raises(RuntimeError, match="same device"):
        operation(torch.ones(3, 4).to(device))


def test_numbers_indices_and_copies_may_cross(device):
    a = torch.arange(12.0).view(3, 4).to(device)
    assert (a * torch.tensor(2.0)).device == device and a[torch.tensor([0, 2])].device == device
    here = torch.zeros(3, 4)
    here.copy_(a)
    a[0] = torch.ones(4)
    assert type(here) is torch.Tensor and here[2].tolist() == [8, 9, 10, 11] and a.cpu()[0].tolist() == [1, 1, 1, 1]
    assert here[torch.tensor(2, device=device)].device.type == "cpu"


def test_it_converts_and_copies(device):
    here = torch.ones(2)
    there = here.to(device)
    here += 1
    assert there.tolist() == [1, 1] and there.cpu().device.type == "cpu" and type(there.to("cpu")) is torch.Tensor
    for made in (torch.zeros(2, device=device), there.new_zeros(3), torch.zeros_like(there), here.to(there), there.half(),
                 torch.tensor([1], device=device), torch.arange(3, device=device)):
        assert made.device == device and not made.is_cpu
    assert there.to(here).device.type == "cpu"


def test_it_gives_no_memory_to_numpy_and_no_noise_to_a_generator_of_the_cpu(device):
    a = torch.ones(2, device=device)
    for convert in (lambda: a.numpy(), lambda: np.asarray(a)):
        with pytest.raises(TypeError, match="cpu"):
            convert()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device=device, generator=torch.Generator())


def test_gradients_live_there(device):
    x = torch.ones(2, 4, device=device, requires_grad=True)
    weight = torch.arange(12.0).view(3, 4).to(device)
    (gradient,) = torch.autograd.grad(F.linear(x, weight).square().sum(), x)
    F.linear(x, weight).square().sum().backward()
    assert gradient.device == x.grad.device == device and torch.equal(gradient, x.grad)


@pytest.mark.parametrize("offload", offloading.OFFLOADS)
def test_ways_of_offloading_rest_and_compute_where_they_say(device, offload):
    """Weights rest where accelerate and diffusers leave them; the stock pipeline's picture is the CPU's."""
    pipe, plain = toys.sd(), toys.sd()
    offloading.place(pipe, offload)
    rests = {"none": device, "model": torch.device("cpu"), "sequential": torch.device("meta"), "group": torch.device("cpu")}
    assert offloading.resting(pipe.unet) == {rests[offload]} and pipe._execution_device == device

    def latents(pipe):
        return pipe("a fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").images

    found = latents(pipe)
    assert found.device == device and torch.equal(found.cpu(), latents(plain))
    assert offloading.resting(pipe.unet) == {rests[offload]}


def test_a_module_is_moved(device):
    layer = nn.Linear(2, 3)
    move(layer, device)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.device == device and len(list(layer.parameters())) == 2
