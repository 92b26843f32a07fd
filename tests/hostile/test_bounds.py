"""Memory and time of reading a LoRA file follow its size: at most three times the file and 200 MB, two seconds for 100 MB."""

import json
import subprocess
import sys
from contextlib import suppress
from time import process_time

import pytest
import torch

from composition import pictures
from composition.loras import reader, safetensors
from composition.refusal import Refused
from tests.hostile import seeds, worker
from tests.hostile.run import ROOT

MB = 10**6
READ = """
import json, resource, sys, time
from pathlib import Path
from composition.loras import reader
BASE = {}
if sys.argv[2] == "read":
    from tests.hostile.readers import BASE
reader.describe(Path(sys.argv[1]))
status = lambda name: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
Path("/proc/self/clear_refs").write_text("5")
before, begun = status("VmRSS"), time.process_time()
try:
    receipt = reader.inspect(Path(sys.argv[1])) if sys.argv[2] == "inspect" else reader.read(Path(sys.argv[1]), BASE, "sd", allow_partial=True).receipt
    words = receipt.line()
except ValueError as error:
    words = f"refused: {error}"
print(json.dumps({"grown": status("VmHWM") - before, "seconds": time.process_time() - begun, "words": words}))
"""


def cost(path, how: str) -> dict:
    """Bytes of memory at the peak, seconds of a processor, and what was said, in a process of its own."""
    answer = subprocess.run([sys.executable, "-c", READ, str(path), how], capture_output=True, text=True, cwd=ROOT, timeout=250, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def zeros(path, kind: str, itemsize: int, size: int) -> None:
    """A pair of factors for a layer that the base has, of `size` bytes of zeros, which take no room on the disk."""
    rank = size // itemsize // 32
    header = {f"{seeds.Q}.lora_down.weight": {"dtype": kind, "shape": [rank, 16], "data_offsets": [0, rank * 16 * itemsize]},
              f"{seeds.Q}.lora_up.weight": {"dtype": kind, "shape": [16, rank], "data_offsets": [rank * 16 * itemsize, rank * 32 * itemsize]}}
    path.write_bytes(seeds.framed(json.dumps(header).encode(), b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + rank * 32 * itemsize)


@pytest.mark.parametrize(("kind", "itemsize", "how"), [("F8_E4M3", 1, "inspect"), ("F8_E4M3", 1, "read"), ("F64", 8, "inspect")])
def test_a_large_file_costs_what_its_size_says(kind, itemsize, how, tmp_path):
    size = 80 * MB
    zeros(tmp_path / "a.safetensors", kind, itemsize, size)
    spent = cost(tmp_path / "a.safetensors", how)
    assert spent["grown"] <= 3 * size + 200 * MB, spent
    assert spent["seconds"] <= 2 * size / (100 * MB) + 1, spent  # one for a busy machine


def test_patterns_of_alpha_cost_modules_plus_patterns(tmp_path):
    """20,000 patterns for 3,000 modules; each with each would be 60 million."""
    patterns = {f"layer_{index}.attn.to_q": 2 for index in range(20_000)}
    tensors = {}
    for index in range(3_000):
        tensors[f"unet.block.{index}.lora_A.weight"] = torch.ones(2, 2)
        tensors[f"unet.block.{index}.lora_B.weight"] = torch.ones(2, 2)
    settings = {"unet.alpha_pattern": patterns, "unet.rank_pattern": patterns | {"nothing": 4}, "unet.r": 2, "unet.lora_alpha": 3}
    path = tmp_path / "a.safetensors"
    path.write_bytes(seeds.lora(tensors, {"lora_adapter_metadata": json.dumps(settings)}))
    spent = cost(path, "inspect")
    assert spent["seconds"] <= 4 and "alpha 3" not in spent["words"].partition("refused")[2], spent


@pytest.mark.parametrize("key", ["lora_alpha", "r", "use_rslora", "alpha_pattern"])
@pytest.mark.parametrize("value", [[0] * 300_000, "9" * 2_000_000, {"a": "b" * 2_000_000}], ids=["list", "text", "object"])
def test_a_large_value_is_not_looked_at_by_every_module(key, value, tmp_path):
    tensors = {}
    for index in range(1_000):
        tensors |= {f"unet.block.{index}.lora_A.weight": torch.ones(1, 1), f"unet.block.{index}.lora_B.weight": torch.ones(1, 1),
                    f"unet.block.{index}.alpha": torch.ones(())}  # fmt: skip
    path = tmp_path / "a.safetensors"
    path.write_bytes(seeds.lora(tensors, {"lora_adapter_metadata": json.dumps({"lora_alpha": 1, key: value}), "lora_alpha": "9" * 2_000_000}))
    begun = process_time()
    reader.inspect(path)
    assert process_time() - begun < 3


ROOM = safetensors.MAX_HEADER_BYTES - 200
TENSOR = b'"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
HEADERS = {
    "lists": lambda: b'{"a":[' + b"[]," * (ROOM // 3) + b"[]]}", "texts": lambda: b'{"a":[' + b'"",' * (ROOM // 3) + b'""]}',
    "quotes": lambda: b'{"a":' + b'"' * ROOM + b"}", "digits": lambda: b'{"a":' + b"9" * ROOM + b"}", "spaces": lambda: b"{" + b" " * ROOM + b"}",
    "one long text": lambda: b'{"__metadata__":{"a":"' + "\U0001f989".encode() * (ROOM // 4) + b'"},' + TENSOR,
    "many words": lambda: b'{"__metadata__":{' + b",".join(b'"%07d":"bbbbbbb"' % index for index in range(100_000)) + b"}," + TENSOR,
    "backslashes": lambda: b'{"a":' + b'"\\\\",' * (ROOM // 5) + b"}", "odd backslashes": lambda: b'{"a":' + b'\\"\\\\"' * (ROOM // 5) + b"}",
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_of_sixteen_megabytes_costs_little(kind, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(seeds.framed(HEADERS[kind](), b"\0"))
    before, begun = worker._reset(), process_time()
    with suppress(Refused):
        reader.inspect(path)
    assert process_time() - begun < 4  # a second and a half at most on a quiet machine
    assert worker._status("VmHWM") - before <= 3 * path.stat().st_size + 200 * MB


def test_a_hundred_bytes_that_claim_a_hundred_million_pixels_cost_nothing(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(seeds.png(size=(9_000, 11_000), colour=6))
    before = worker._reset()
    with pytest.raises(Refused, match="cut short"):
        pictures.load(path)
    assert worker._status("VmHWM") - before <= 20 * MB
