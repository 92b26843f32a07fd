"""Loading and letting go: flat memory over many files, files read ahead in another thread, and what a file's author cannot make us keep."""

import gc
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch

from composition import Engine, Request, backbones, batch
from composition.adapters import Adapters
from composition.adapters.ahead import Ahead
from composition.backbones.unet import UNetBackbone
from composition.loras import reader
from composition.refusal import Refused
from composition.request import Lora
from tests import toys
from tests.composition.loras import lora_writers as writers

CYCLES = 50


@pytest.fixture(scope="module")
def pipe():
    return toys.sd()


@pytest.fixture
def files(pipe, tmp_path):
    return [toys.lora(pipe, tmp_path / f"{seed}.safetensors", seed=seed, layout="kohya", alpha=1.0) for seed in range(4)]


def adapters(pipe, **more):
    backbone = UNetBackbone(pipe, "sd")
    return Adapters(backbone.components, family="sd", block=backbone.block, **more)


def tensor_bytes() -> int:
    """Of every tensor that is alive, memory that several share counted once."""
    gc.collect()
    return sum({(storage := item.untyped_storage()).data_ptr(): storage.nbytes() for item in gc.get_objects() if type(item) is torch.Tensor}.values())


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def test_fifty_cycles_at_flat_memory(pipe, tmp_path):
    """Another file of four each time, of which two are kept; its session is opened, a layer computes with it, and it is closed. What remains
    after 50 is what remained after 10."""
    updates = [[one for one in writers.updates(pipe, seed=seed, only="attn1.to_q") if one.component == "unet"] for seed in range(4)]
    files = [writers.save(tmp_path / f"{seed}.safetensors", writers.WRITERS["kohya"](pipe, some)) for seed, some in enumerate(updates)]
    size = reader.read(files[0], {"unet": pipe.unet}, "sd").nbytes
    held = adapters(pipe, kept_bytes=2 * size)
    layer = pipe.unet.get_submodule(updates[0][0].path)
    assert isinstance(layer, torch.nn.Linear)
    after: dict[int, tuple[int, int, int]] = {}
    tracemalloc.start()
    try:
        for cycle in range(1, CYCLES + 1):
            path = files[cycle % len(files)]
            with held.session([("a", Lora(str(path)), path)]), torch.no_grad():
                held.use({"a": 1.0})
                layer(torch.ones(1, 3, layer.in_features))
            if cycle in (10, CYCLES):
                after[cycle] = tensor_bytes(), tracemalloc.get_traced_memory()[0], resident()
    finally:
        tracemalloc.stop()
        held.close()
    tensors, python, memory = (late - early for early, late in zip(after[10], after[CYCLES], strict=True))
    assert tensors <= 0 and python < 300_000 and memory < 20_000_000


def test_the_same_bytes_are_parsed_once(pipe, files, monkeypatch, tmp_path):
    """By whatever path, as long as they are held; a file that changed is read again."""
    calls: list[Path] = []
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda path, *rest, **more: calls.append(path) or read(path, *rest, **more))
    held = adapters(pipe)
    for _ in range(3):
        held.load(files[0], Lora("a"))
    assert len(calls) == 1
    files[0].write_bytes(files[1].read_bytes())
    assert held.load(files[0], Lora("a")).sha256 == held.load(files[1], Lora("b")).sha256
    assert len(held._held.files) == 2 and len(calls) == 3
    held.close()


def test_files_are_read_ahead(pipe, files, monkeypatch):
    """In another thread; what is asked for then is there, what is not is let go of, and what is wrong is said when it is asked for."""
    threads: dict[str, threading.Thread] = {}
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda path, *rest, **more: threads.setdefault(path.stem, threading.current_thread()) and read(path, *rest, **more))
    held = adapters(pipe)
    expected = read(files[0], held.components, "sd").receipt
    held.prefetch(files[:2])
    for future in list(held._held._ahead._results.values()):
        future.result(60)
    receipt = held.load(files[0], Lora("mine"))
    assert receipt.sha256 == expected.sha256 and receipt.name == "mine" and threads["0"] is not threading.current_thread()
    held.prefetch(files[:1])  # held already
    assert not held._held._ahead._results
    files[2].write_bytes(b"broken")
    held.prefetch([files[2], files[2].with_name("none.safetensors")])
    with pytest.raises(Refused, match="2.safetensors is damaged"):
        held.load(files[2], Lora("c"))
    small = adapters(pipe, kept_bytes=files[3].stat().st_size)
    small.prefetch(files[3:])
    assert not small._held._ahead._results  # more than half of what may be kept
    held.prefetch(files[3:])
    held.close()
    small.close()
    assert held.load(files[3], Lora("d")).applied


def test_what_was_read_ahead_is_taken_once():
    ahead: Ahead[int] = Ahead()
    begun, go = threading.Event(), threading.Event()
    ahead.want({"a": lambda: begun.set() or go.wait(10) or 1, "b": lambda: 2, "c": lambda: 1 // 0})
    assert begun.wait(10) and ahead.take("b") is None  # had not begun: whoever asks computes it
    go.set()
    assert ahead.take("a") and ahead.take("a") is None and ahead.take("c") is None and ahead.take("d") is None
    ahead.close()


def test_words_of_a_header_count_as_memory(pipe, tmp_path):
    """Else thousands of files of one tensor each and megabytes of metadata would be kept."""
    made = [one for one in writers.updates(pipe, only="attn1.to_q") if one.component == "unet"][:1]
    held = adapters(pipe, kept_bytes=2_000_000)
    for index in range(4):
        tensors, _ = writers.WRITERS["kohya"](pipe, made)
        held.load(writers.save(tmp_path / f"{index}.safetensors", (tensors, {"words": f"{index}" * 900_000})), Lora("a"))
    assert len(held._held.files) == 2
    held.close()


def test_a_batch_reads_ahead(pipe, files, monkeypatch, tmp_path):
    """While one picture is drawn, the LoRAs of the next one that is missing are read."""
    engine = Engine(backbones.of(toys.sd(), "sd"), "toy")
    asked: list[list[str]] = []
    monkeypatch.setattr(engine.adapters, "prefetch", lambda paths, **_: asked.append([path.stem for path in paths]))
    requests = [Request("a fox", loras=[Lora(str(files[index]))], steps=1, size=(16, 16), seed=seed) for index in (0, 1) for seed in (1, 2)]
    assert len([item for item in batch.run_many(engine, requests, tmp_path / "out") if item.error == ""]) == 4
    assert asked == [["1"]]
