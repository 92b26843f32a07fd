"""Placement: device, number type and offloading, decided from names and free memory, carried out by diffusers."""

import pytest
import torch
from torch import nn

from composition.backbones.loading import placement
from composition.backbones.loading.placement import GIB, Placement, choose, place, settle
from composition.refusal import Refused
from tests import toys


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend to be a machine with so many CUDA devices, with or without bfloat16, or with MPS."""

    def pretend(cuda: int = 0, bf16: bool = True, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    pretend()
    return pretend


def chosen(plan: Placement) -> tuple[str, str, str]:
    return str(plan.device), str(plan.dtype).removeprefix("torch."), plan.offload


def test_the_best_of_each_machine(machine) -> None:
    assert chosen(choose()) == ("cpu", "float32", "none")
    machine(mps=True)
    assert chosen(choose()) == ("mps", "float16", "none")
    machine(cuda=1)
    assert chosen(choose()) == ("cuda:0", "float16", "auto")
    assert chosen(choose(family="sdxl")) == ("cuda:0", "bfloat16", "auto")
    machine(cuda=1, bf16=False)
    old = choose(family="sdxl")
    assert chosen(old) == ("cuda:0", "float16", "auto") and "no bfloat16" in old.why


@pytest.mark.parametrize(("name", "dtype"), [
    ("float16", torch.float16), ("fp16", torch.float16), ("half", torch.float16), ("bf16", torch.bfloat16),
    ("torch.bfloat16", torch.bfloat16), ("FP32", torch.float32), ("float64", torch.float64), ("auto", torch.float32),
])
def test_number_types_by_name(machine, name: str, dtype: torch.dtype) -> None:
    assert choose(dtype=name).dtype == dtype


def test_devices_by_name(machine) -> None:
    machine(cuda=2)
    assert chosen(choose("cuda:1", "fp16", "none")) == ("cuda:1", "float16", "none")
    assert choose("cuda").device == choose("gpu").device == torch.device("cuda:0")
    assert chosen(choose("cpu", pipeline_bytes=10**12)) == ("cpu", "float32", "none")


@pytest.mark.parametrize(("arguments", "words"), [
    ({"device": "cuda"}, "this machine has no device 'cuda'.*it has cpu"),
    ({"device": "cuda:3"}, "this machine has no device 'cuda:3'"),
    ({"device": "mps"}, "this machine has no device 'mps'"),
    ({"device": "tpu"}, "there is no device 'tpu': name one of cpu"),
    ({"dtype": "fp8"}, "there is no dtype 'fp8'"),
    ({"offload": "disk"}, "there is no offload 'disk'"),
    ({"offload": "model"}, "the device is cpu, and it is main memory already: use offload auto or none"),
    ({"device": "cpu", "offload": "group"}, "main memory already"),
])
def test_what_is_not_there_is_refused(machine, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(Refused, match=words):
        choose(**arguments)
    machine(mps=True)
    with pytest.raises(Refused, match="mps has no float64"):
        choose(dtype="float64")


SD15, SDXL = int(2.0 * GIB), int(6.5 * GIB)


@pytest.mark.parametrize(("size", "free", "expected"), [
    (SD15, 24, "none"), (SD15, 8, "none"), (SD15, 3.8, "model"), (SD15, 3, "group"),
    (SDXL, 24, "none"), (SDXL, 12, "none"), (SDXL, 8, "model"), (SDXL, 6, "group"),
])
def test_offloading_by_free_memory(machine, size: int, free: float, expected: str) -> None:
    machine(cuda=1)
    plan = choose(pipeline_bytes=size, free=int(free * GIB))
    assert plan.offload == expected and "GiB free" in plan.why
    for said in ("none", "model", "sequential", "group"):
        assert choose(offload=said, pipeline_bytes=size, free=int(free * GIB)).offload == said
    later = choose()
    assert later.offload == "auto"
    assert settle(later, size, int(placement.LARGEST * size), int(free * GIB)).offload == expected


def test_free_memory_is_asked_of_the_device_and_counts_what_torch_keeps(machine, monkeypatch) -> None:
    machine(cuda=1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GIB)
    assert choose(pipeline_bytes=SDXL).offload == "none"  # 3 + 8 - 1 = 10 GiB
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8 * GIB)
    assert choose(pipeline_bytes=SDXL).offload == "group"


def draw(pipe) -> torch.Tensor:
    made = pipe("a fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").images
    pipe.maybe_free_model_hooks()
    return made


def test_the_cpu_for_real() -> None:
    pipe = toys.sd()
    plan = place(pipe, choose("cpu", "float64"))
    assert chosen(plan) == ("cpu", "float64", "none")
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float64}
    assert torch.isfinite(draw(pipe)).all()


@pytest.mark.parametrize("make", [toys.sd, toys.sdxl])
@pytest.mark.parametrize("offload", ["model", "group"])  # accelerate's sequential hooks need a true second device
def test_offloading_changes_no_picture(make, offload: str) -> None:
    """diffusers' own hooks, from the CPU to the CPU, so that they run where there is no GPU."""
    pipe, plain = make(), draw(make())
    place(pipe, Placement(torch.device("cpu"), torch.float32, offload, ""))  # type: ignore[arg-type]
    assert torch.equal(draw(pipe), plain) and torch.equal(draw(pipe), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["none", "model", "sequential", "group"])
def test_offloading_on_a_gpu(offload: str) -> None:
    pipe, plain = toys.sd(), toys.sd()
    place(plain, choose("cuda", "fp32", "none"))
    place(pipe, choose("cuda", "fp32", offload))
    assert torch.allclose(draw(pipe), draw(plain), atol=1e-4)


def test_main_memory_is_what_a_container_allows(tmp_path, monkeypatch) -> None:
    """Its limit less what is used, files in the cache not counted; without a limit what the machine has."""
    machine = type("Memory", (), {"available": 30 * GIB})
    monkeypatch.setattr(placement.psutil, "virtual_memory", lambda: machine)
    assert placement._main_memory(tmp_path) == 30 * GIB
    (tmp_path / "memory.current").write_text(f"{9 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {3 * GIB}\nactive_file {GIB}\ninactive_file {5 * GIB}\n")
    for limit, free in (("max", 30), (16 * GIB, 13), (2 * GIB, 0), (64 * GIB, 30)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert placement._main_memory(tmp_path) == free * GIB
    assert placement.available(torch.device("cpu")) == 30 * GIB
