"""Where a model runs: its device, its number type, and whether its weights wait in main memory.

`choose` decides from names and free memory, `place` carries the decision out with diffusers' own offloading.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn

from composition.backbones.loading import quantize as quantization
from composition.refusal import Refused

Offload = Literal["auto", "none", "model", "sequential", "group"]
OFFLOADS: tuple[Offload, ...] = ("auto", "none", "model", "sequential", "group")
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "fp32": torch.float32, "single": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float64": torch.float64, "fp64": torch.float64, "double": torch.float64,
}

GIB = 2**30
ROOM = 2 * GIB  # what a picture needs besides the weights: activations, LoRA factors, decoding; 1024 px in half
LARGEST = 0.8  # share of a pipeline's weights that its denoiser has: 0.81 in SD1.5, 0.74 in SDXL


@dataclass(frozen=True)
class Placement:
    """device and dtype to run in. offload: how weights are kept in main memory ("auto": settled when placed).

    why: one line for people, saying what was chosen and for which reason.
    """

    device: torch.device
    dtype: torch.dtype
    offload: Offload
    why: str


def choose(
    device: str | None = None, dtype: str | None = None, offload: str = "auto", pipeline_bytes: int | None = None,
    *, family: str = "sd", free: int | None = None,
) -> Placement:
    """Device, number type and offloading for a model, by name or (None, "auto") the best of this machine.

    device: "cuda", "cuda:1", "mps", "cpu". dtype: a name in DTYPES. pipeline_bytes: the size of all weights in that
    dtype; None leaves "auto" to `place`, which has the model before it. free: bytes free on the device, None to ask
    it. Raises Refused for what this machine does not have.
    """
    where = _device(device)
    number, reason = _dtype(dtype, where, family)
    if offload not in OFFLOADS:
        raise Refused(f"there is no offload {offload!r}: it is one of {', '.join(OFFLOADS)}")
    if where.type in ("cpu", "mps") and offload not in ("auto", "none"):
        held = "it is main memory already" if where.type == "cpu" else "its memory is main memory"
        raise Refused(f"offload {offload!r} moves weights between a GPU and main memory; the device is {where}, and "
                      f"{held}: use offload auto or none")
    plan = Placement(where, number, offload, f"{where}, {str(number).removeprefix('torch.')}{reason}")  # type: ignore[arg-type]
    if where.type in ("cpu", "mps"):
        return replace(plan, offload="none")
    if offload == "auto" and pipeline_bytes is not None:
        return settle(plan, pipeline_bytes, int(LARGEST * pipeline_bytes), free)
    return plan


def settle(plan: Placement, total: int, largest: int, free: int | None = None) -> Placement:
    """The plan with "auto" settled: whole on the device, else one component at a time, else layer by layer.

    total, largest: bytes of all weights and of the largest component in the plan's dtype; free: bytes free on the
    device, None to ask it.
    """
    if plan.offload != "auto":
        return plan
    free = available(plan.device) if free is None else free
    if total + ROOM <= free:
        chosen: Offload = "none"
    elif largest + ROOM <= free:
        chosen = "model"
    else:
        chosen = "group"
    room = f"{total / GIB:.1f} GiB of weights, {free / GIB:.1f} GiB free"
    words = {"none": "all on the device", "model": "one component at a time", "group": "layer by layer: slow"}[chosen]
    return replace(plan, offload=chosen, why=f"{plan.why}; {room}: {words}")


def place(pipeline: Any, plan: Placement) -> Placement:
    """Put a loaded pipeline where the plan says, by diffusers' own means; returns the plan, settled.

    Offloaded weights rest in main memory (as "meta" tensors under "sequential"): fold nothing into them but under
    "none" and "model". After a picture call `pipeline.maybe_free_model_hooks()`.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    sizes = [quantization.size(part, plan.dtype) for part in parts]
    for part in parts:
        if not quantization.quantized(part):
            nn.Module.to(part, dtype=plan.dtype)
    plan = settle(plan, sum(sizes), max(sizes, default=0))
    carry_out: dict[str, Callable[[], Any]] = {
        "none": lambda: pipeline.to(plan.device),
        "model": lambda: pipeline.enable_model_cpu_offload(device=plan.device),
        "sequential": lambda: pipeline.enable_sequential_cpu_offload(device=plan.device),
        "group": lambda: pipeline.enable_group_offload(
            onload_device=plan.device, offload_type="leaf_level", use_stream=plan.device.type == "cuda"
        ),
    }
    try:
        carry_out[plan.offload]()
    except torch.OutOfMemoryError:
        raise Refused(f"the model does not fit on {plan.device} ({sum(sizes) / GIB:.1f} GiB of weights): close other "
                      f"programs that use it, or use offload model or group") from None
    return plan


def _device(name: str | None) -> torch.device:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    have = [*(f"cuda:{index}" for index in range(torch.cuda.device_count() if cuda else 0)), *["mps"] * mps, "cpu"]
    if name is None or name == "auto":
        return torch.device("cuda:0" if cuda else "mps" if mps else "cpu")
    wanted = name.strip().lower()
    if wanted in ("gpu", "cuda"):
        wanted = "cuda:0"
    if wanted in have:
        return torch.device(wanted)
    if not re.fullmatch(r"(cuda:\d+|mps|cpu)", wanted):
        raise Refused(f"there is no device {name!r}: name one of {', '.join(have)}")
    built = torch.backends.cuda.is_built() or wanted == "mps"
    hint = "" if built else " (this PyTorch was installed without CUDA: see pytorch.org for the line that has it)"
    raise Refused(f"this machine has no device {name!r}{hint}: it has {', '.join(have)}")


def _dtype(name: str | None, device: torch.device, family: str) -> tuple[torch.dtype, str]:
    """The number type, and why when it is not the one to be expected."""
    if name is not None and name != "auto":
        wanted = name.strip().lower().removeprefix("torch.")
        if wanted not in DTYPES:
            raise Refused(f"there is no dtype {name!r}: name one of {', '.join(DTYPES)}")
        if device.type == "mps" and DTYPES[wanted] is torch.float64:
            raise Refused("mps has no float64: use float32, float16 or bfloat16")
        return DTYPES[wanted], ""
    if device.type == "cuda":
        # Half has the finer steps and is enough for SD1.x and SD2.x; larger models overflow it here and there.
        if family == "sd":
            return torch.float16, ""
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, ""
        return torch.float16, " (this GPU has no bfloat16)"
    return (torch.float16, "") if device.type == "mps" else (torch.float32, "")


def available(device: torch.device) -> int:
    """Bytes free on a device: of CUDA those torch holds but does not use included, else of main memory."""
    if device.type != "cuda":
        return _main_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _main_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that programs can still have; in a container (group: its files) no more than it is allowed."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = sum(int(parts.get(name, 0)) for name in ("active_file", "inactive_file"))  # given up when memory is short
        free = min(free, max(0, limit - used + files))
    return free
