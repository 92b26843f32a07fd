"""A set of LoRAs as one file: alone, added up, it is what the method makes of the set; stock diffusers reads it alike."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from composition import Engine, Lora, Refused, Request, backbones, methods
from composition.export import export
from composition.loras import compact
from tests import reference, toys
from tests.composition.laws import differ, latents, merged, same

EXPORTABLE = sorted(name for name, method in methods.all().items() if method.static)
FOUND = ("sd", "flux")
TARGETS = ("attn", "ff", "proj", "conv", "time")  # every layer that a LoRA of these families touches


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Family -> files of three LoRAs, of ranks 4, 3 and 2, on layers that are not the same; the second's alpha is half its rank."""
    folder, found = tmp_path_factory.mktemp("sets"), {}
    for family, make in {"sd": toys.sd, "sdxl": toys.sdxl, "flux": toys.flux, "sd3": toys.sd3}.items():
        pipe = make(dtype=torch.float64)
        found[family] = [
            toys.lora(pipe, folder / f"{family}-a.safetensors", seed=1, targets=TARGETS, dtype=torch.float64),
            toys.lora(pipe, folder / f"{family}-b.safetensors", seed=2, rank=3, alpha=1.5, scale=0.2, dtype=torch.float64),
            toys.lora(pipe, folder / f"{family}-c.safetensors", seed=3, rank=2, targets=("attn", "conv"), text=False, dtype=torch.float64)]
    return found


def asked(method, files, **changes):
    weights = (Lora(str(files[0]), weight=0.8, category="style", blocks={"mid": 0.5, "double.0": 0.25, "joint.1": 0.5}),
               Lora(str(files[1]), weight=-0.6, text_weight=0.9, category="character"), Lora(str(files[2]), weight=0.4, category="object"))
    blocks = {"sd": ("mid",), "sdxl": ("mid",), "flux": ("double.0",), "sd3": ("joint.1",)}[files[0].stem.partition("-")[0]]
    weights = (replace(weights[0], blocks={name: weights[0].blocks[name] for name in blocks}), *weights[1:])
    return Request(**({"prompt": "the fox and the owl on the moon", "loras": weights, "method": method, "steps": 3, "guidance": 4.0, "seed": 5,
                       "size": (16, 16)} | changes))


def alone(request, file, **changes):
    return replace(request, loras=(Lora(str(file)),), method="merge", options={}, **changes)


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("method", EXPORTABLE)
def test_the_file_alone_is_the_set(engines, sets, tmp_path, method, family):
    engine, request = engines[family], asked(method, sets[family])
    written = export(engine, request, tmp_path / "set.safetensors", dtype=torch.float64)
    same(latents(engine, alone(request, written.file)), latents(engine, request))
    assert written.kept == 1.0 and not engine.adapters.names
    receipt = engine.inspect(str(written.file))
    assert not receipt.ignored and receipt.category == "" and set(receipt.components) == set(written.components)


@pytest.mark.parametrize("family", ("sdxl", "sd3"))
def test_the_other_families(engines, sets, tmp_path, family):
    engine, request = engines[family], asked("merge", sets[family])
    same(latents(engine, alone(request, export(engine, request, tmp_path / "set.safetensors", dtype=torch.float64).file)), latents(engine, request))


@pytest.mark.parametrize("family", ("sd", "sdxl", "sd3", "flux"))
def test_stock_diffusers_reads_it_alike(sets, tmp_path, family):
    """Ranks that differ by layer, convolutions, time embeddings and text encoders included."""
    make = {"sd": toys.sd, "sdxl": toys.sdxl, "sd3": toys.sd3, "flux": toys.flux}[family]
    engine = Engine(backbones.of(make(dtype=torch.float64), family), "toy")  # one that no other test has used
    request = asked("ssr", sets[family], options={"ridge": 0.1}, size=(32, 32))
    written = export(engine, request, tmp_path / "set.safetensors", dtype=torch.float64)
    assert len(written.ranks) > 2
    pipe = make(dtype=torch.float64)
    reference.load(pipe, [written.file], [1.0])
    stock = reference.stock(pipe, request.prompt, "", 3, 4.0, [torch.Generator().manual_seed(5)])
    same(latents(engine, request), stock, 1e-6)  # PEFT keeps adapters of a float64 base in float32
    differ(latents(engine, replace(request, loras=())), stock)


def test_half_precision(engines, sets, tmp_path):
    engine, request = engines["sd"], asked("ssr", sets["sd"])
    written = export(engine, request, tmp_path / "set.safetensors")
    with safe_open(written.file, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    same(latents(engine, alone(request, written.file)), latents(engine, request), 5e-3)


def test_fewer_ranks(engines, sets, tmp_path):
    """All of them is exact, fewer keep what the singular values say, and layers that have no more are as they were."""
    engine, request = engines["flux"], asked("merge", sets["flux"])
    whole = export(engine, request, tmp_path / "whole.safetensors", dtype=torch.float64, rank=9)
    same(latents(engine, alone(request, whole.file)), latents(engine, request))
    assert whole.kept == pytest.approx(1.0)
    small = export(engine, request, tmp_path / "small.safetensors", dtype=torch.float64, rank=3)
    assert max(small.ranks) == 3 and 0.3 < small.kept < 1
    differ(latents(engine, alone(request, small.file)), latents(engine, request))


def test_truncated_is_the_nearest():
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((6, 3, 2, 2), (9, 6)))
    product = up @ down.flatten(1)
    (small, wide), kept, whole = compact.truncated(down, up, 2)
    left, values, right = torch.linalg.svd(product)
    torch.testing.assert_close(wide @ small.flatten(1), left[:, :2] * values[:2] @ right[:2])
    assert (kept, whole) == pytest.approx((float(values[:2].square().sum()), float(product.square().sum())))


def test_even_numbers_survive_half_precision():
    """Factors of very different sizes, as training leaves them: the product is exact, and half precision keeps it."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 20, generator=generator) * 100, torch.randn(30, 4, generator=generator) * torch.tensor([1e-7, 1e-3, 1.0, 0.0])
    a, b = compact.even(down, up)
    assert torch.equal(a * b.T.abs().amax(1)[:, None], down * up.T.abs().amax(1)[:, None])
    error = (b[:, :3].half().float() @ a[:3].half().float() - up[:, :3] @ down[:3]).norm() / (up @ down).norm()
    assert error < 1e-3


def test_ranks_without_effect_are_left_out(engines, sets, tmp_path):
    engine, request = engines["sd"], asked("merge", sets["sd"])
    only = replace(request, loras=(replace(request.loras[0], weight=0.0), request.loras[1], replace(request.loras[2], weight=0.0)))
    written = export(engine, only, tmp_path / "set.safetensors", dtype=torch.float64)
    assert set(written.ranks) == {3}
    same(latents(engine, alone(request, written.file)), merged(engine, request.loras[1], steps=3, seed=5, prompt=request.prompt, negative=""))


def test_the_header(engines, sets, tmp_path):
    engine, request = engines["sd"], asked("ssr", sets["sd"], options={"ridge": 0.5})
    loras = [replace(lora, triggers=words) for lora, words in zip(request.loras, (("fox", "red"), ("owl",), ("fox",)), strict=True)]
    written = export(engine, replace(request, loras=loras), tmp_path / "set.safetensors")
    receipt = engine.inspect(str(written.file))
    assert receipt.title == "sd-a + sd-b + sd-c (SSR-Merge)" and receipt.triggers == ("fox", "red", "owl")
    said = receipt.metadata
    rows = json.loads(said["loras"])
    assert [(row["name"], row["weight"]) for row in rows] == [("sd-a", 0.8), ("sd-b", -0.6), ("sd-c", 0.4)]
    assert [row["sha256"] for row in rows] == [each.sha256 for each in written.receipts] and rows[1]["text_weight"] == 0.9 and rows[0]["blocks"] == {"mid": 0.5}
    assert said["method"] == "ssr" and json.loads(said["method_options"]) == {"ridge": 0.5} and said["base"] == "toy"
    assert str(tmp_path) not in json.dumps(said)
    again = export(engine, replace(request, loras=loras), tmp_path / "again.safetensors")
    assert again.file.read_bytes() == written.file.read_bytes()


@pytest.mark.parametrize("change, words", [
    ({"method": "composite"}, "method composite is not one LoRA"),
    ({"anchored": True}, "anchored guidance is a way to draw a picture"),
    ({"windows": "both"}, "leave out start and end, and windows"),
    ({"schedule": 0.5}, "on from 0.5 to 1"),
    ({"region": (0.0, 0.0, 0.5, 1.0)}, "has a region"),
    ({"weight": 0.0}, "nothing to export"),
])
def test_refusals(engines, sets, tmp_path, change, words):
    request = asked("merge", sets["sd"][:1] * 3)
    change = dict(change)
    if change.keys() & {"method", "anchored", "windows"}:
        request = replace(request, **change)
    elif "weight" in change:
        request = replace(request, loras=(Lora(str(sets["sd"][0]), weight=0.0),))
    else:
        more = {"start": change["schedule"]} if "schedule" in change else change
        request = replace(request, loras=(replace(request.loras[0], **more),))
    with pytest.raises(Refused, match=words):
        export(engines["sd"], request, tmp_path / "set.safetensors")
    assert not (tmp_path / "set.safetensors").exists()


def test_too_large_for_half_precision(engines, tmp_path):
    pipe = toys.sd(dtype=torch.float64)
    file = toys.lora(pipe, tmp_path / "large.safetensors", scale=1e12, text=False)
    engine = Engine(backbones.of(pipe, "sd"), "toy")
    request = Request("a fox", loras=[Lora(str(file))], steps=2, size=(16, 16))
    with pytest.raises(Refused, match="too large for float16: write the file in float32"):
        export(engine, request, tmp_path / "set.safetensors")
    export(engine, request, tmp_path / "set.safetensors", dtype=torch.float32)


def test_mutant_a_weight_that_is_dropped(engines, sets, tmp_path, monkeypatch):
    from composition.adapters.stack import Stack

    engine, request = engines["sd"], asked("merge", sets["sd"])
    expected = latents(engine, request)
    true = Stack.constant
    monkeypatch.setattr(Stack, "constant", lambda self, gate, device, dtype: true(self, torch.ones_like(gate), device, dtype))
    written = export(engine, request, tmp_path / "set.safetensors", dtype=torch.float64)
    monkeypatch.undo()
    differ(latents(engine, alone(request, written.file)), expected)
