"""Every method, way of offloading and dtype on a device that refuses to meet the CPU, in pairs: the picture is the CPU's.

A toy's computations on the pretended device are the CPU's own, so its latents must be those of a run without it; whatever is
built where weights rest and not where activations are raises.
"""

import pytest
import torch

from composition import Engine, backbones, methods
from tests import toys
from tests.composition import laws
from tests.composition.devices import offloading
from tests.composition.devices.pretended import DEVICE, pretended

FAMILIES = {"sd": toys.sd, "flux": toys.flux}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = tuple(methods.all())
# Each method with each way of offloading; the dtypes in turn, so that each meets every method and every way of offloading.
CASES = [(family, method, offload, DTYPES[(row + column) % 3]) for family in FAMILIES for row, method in enumerate(METHODS)
         for column, offload in enumerate(offloading.OFFLOADS)]


def test_the_cases_are_all_pairs():
    for family in FAMILIES:
        mine = [case[1:] for case in CASES if case[0] == family]
        assert {(m, o) for m, o, _ in mine} == {(m, o) for m in METHODS for o in offloading.OFFLOADS}
        assert {(m, d) for m, _, d in mine} == {(m, d) for m in METHODS for d in DTYPES}
        assert {(o, d) for _, o, d in mine} == {(o, d) for o in offloading.OFFLOADS for d in DTYPES}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return {family: [toys.lora(make(), folder / f"{family}-{seed}.safetensors", seed=seed, rank=rank, dtype=torch.float16)
                     for seed, rank in ((1, 4), (2, 3))] for family, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def plain():
    """Latents of a request on the CPU, made once."""
    kept = {}

    def latents(family, request, dtype):
        key = (family, request.json(), dtype)
        if key not in kept:
            with Engine(backbones.of(FAMILIES[family](dtype=dtype), family), "toy") as engine:
                kept[key] = laws.latents(engine, request)
        return kept[key]

    return latents


def asked(method, files, **changes):
    return laws.request(method, *laws.loras_of(files), **{"steps": 3, "sampler": "default", **changes})


def on_the_device(family, request, offload, dtype):
    """Latents of a request with this way of offloading, and its result."""
    with pretended():
        pipe = FAMILIES[family](dtype=dtype)
        placement = offloading.place(pipe, offload)
        with Engine(backbones.of(pipe, family, placement), "toy") as engine:
            assert engine.device == DEVICE
            last = {}
            result = engine.run(request, on_step=lambda event: last.__setitem__(event.picture, event.latents.clone()))
            assert {value.device for value in last.values()} == {DEVICE}
            return torch.cat([value.cpu() for value in last.values()]), result


@pytest.mark.parametrize(("family", "method", "offload", "dtype"), CASES,
                         ids=lambda value: str(value).removeprefix("torch."))
def test_a_picture_is_the_cpus(family, method, offload, dtype, files, plain):
    request = asked(method, files[family])
    found, _ = on_the_device(family, request, offload, dtype)
    expected = plain(family, request, dtype)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-2 if dtype != torch.float32 else 1e-4)
