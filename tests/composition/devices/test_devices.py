"""Every method, way of offloading and dtype on a device that refuses to meet the CPU, in pairs: the picture is the CPU's.

A toy's computations on the pretended device are the CPU's own, so its latents must be those of a run without it; whatever is
built where weights rest and not where activations are raises.
"""

import itertools

import pytest
import torch

from composition import Engine, backbones, methods
from composition.adapters.gates import Gates
from composition.adapters.stack import Stack
from composition.loras.kinds.lora import Factors
from tests import toys
from tests.composition import laws
from tests.composition.devices import offloading
from tests.composition.devices.pretended import DEVICE, move, pretended
from tests.composition.test_laws import FUSIONS

pytestmark = pytest.mark.usefixtures("shapes_unchecked")
FAMILIES = {"sd": toys.sd, "flux": toys.flux}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = tuple(methods.all())
# Each method with each way of offloading, on the families by turns; the dtypes in turn, too: each meets every method, way of offloading and family.
# Methods that change nothing but factors or the gates of ranks meet every other way of offloading, and both families.
CASES = [(list(FAMILIES)[(row + column) % 2], method, offload, DTYPES[(row + column) % 3]) for row, method in enumerate(METHODS)
         for column, offload in enumerate(offloading.OFFLOADS) if method not in FUSIONS or (row + column // 2) % 2 == 0]


def test_the_cases_are_all_pairs():
    for first, second in itertools.combinations(range(4), 2):
        values = [FAMILIES, METHODS, offloading.OFFLOADS, DTYPES]
        pairs = {(case[first], case[second]) for case in CASES}
        for pair in set(itertools.product(values[first], values[second])) - pairs:
            assert pair[0] in FUSIONS and pair[1] not in FAMILIES or pair[1] in FUSIONS and pair[0] not in FAMILIES, pair


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


@pytest.mark.parametrize("offload", ["none", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fold_is_written_where_the_weights_rest_and_lifted_there(family, offload, files, plain):
    """Enough steps to fold: the same picture, and afterwards the very weights, at rest where they were."""
    request = asked("merge", files[family], steps=4)
    with pretended():
        pipe = FAMILIES[family]()
        engine = Engine(backbones.of(pipe, family, offloading.place(pipe, offload)), "toy")
        denoiser = engine.backbone.denoiser
        before = {name: weight.detach().cpu().clone() for name, weight in denoiser.named_parameters()}
        rest = offloading.resting(denoiser)
        assert rest == ({DEVICE} if offload == "none" else {torch.device("cpu")})
        folds, honest = [], engine.adapters.folded
        engine.adapters.folded = lambda *rest: folds.append(rest) or honest(*rest)
        last = {}
        engine.run(request, on_step=lambda event: last.__setitem__(0, event.latents.cpu()))
        assert len(folds) == 1
        assert offloading.resting(denoiser) == rest
        assert all(torch.equal(weight.detach().cpu(), before[name]) for name, weight in denoiser.named_parameters())
    torch.testing.assert_close(last[0], plain(family, request, torch.float32), rtol=1e-4, atol=1e-4)


# mutants: what acts on activations is built where weights or factors rest, as it once was -----------------------------


def _owners_at_rest(monkeypatch):
    honest = Stack._owners
    monkeypatch.setattr(Stack, "_owners", lambda self, device: honest(self, torch.device("cpu")))


def _factors_at_rest(monkeypatch):
    monkeypatch.setattr(Stack, "product", lambda self, like: self._built(torch.device("cpu"), like.dtype))


@pytest.mark.parametrize(("mutant", "method"), [(_owners_at_rest, "merge"), (_factors_at_rest, "merge"), (_factors_at_rest, "composite"),
                                                (_owners_at_rest, "regions")])
def test_mutants_are_refused_by_the_device(mutant, method, monkeypatch, files):
    mutant(monkeypatch)
    with pytest.raises(RuntimeError, match="same device"):
        on_the_device("sd", asked(method, files["sd"]), "model", torch.float32)


@pytest.mark.parametrize("mutant", [None, "gates at rest"])
def test_rows_that_are_gathered_by_an_index_at_rest_are_refused(mutant, monkeypatch):
    """cmlora asks LoRAs in any order: the index of its rows must be on the device too."""
    gates = Gates(torch.ones(1, 2, dtype=torch.float64))
    if mutant:
        honest = Gates.on
        monkeypatch.setattr(Gates, "on", lambda self, device: honest(self, torch.device("cpu")))
    layer = torch.nn.Linear(4, 4)
    stack = Stack([Factors(torch.ones(2, 4), torch.ones(4, 2)) for _ in range(2)], gates, 0)
    gates.per_row([(0, 1), (1, 0)])
    with pretended(), torch.no_grad():
        move(layer, DEVICE)
        x = torch.ones(2, 3, 4, device=DEVICE)
        if mutant:
            with pytest.raises(RuntimeError, match="same device"):
                stack(layer, x, layer(x))
        else:
            assert stack(layer, x, layer(x)).device == DEVICE
