"""Sketches: what they are of dense updates, what they do not depend on, and how near their inner products are to the true ones."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from composition import Refused
from composition.backbones.loading import skeleton
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import load_safely
from retrieval import singular
from retrieval.sketch import SIDE, VERSION, packed, projection, sketch, sketched, unpacked
from tests import toys
from tests.composition.loras import lora_writers

SHAPES = {"linear": ((3, 24), (18, 3)), "convolution": ((2, 6, 3, 3), (10, 2, 1, 1)), "rank over width": ((9, 4), (6, 9)), "wide": ((4, 500), (300, 4))}


def lora(seed=0, dtype=torch.float64, alpha=None, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return {name: Factors(*((torch.randn(size, generator=rng, dtype=torch.float64) * scale).to(dtype) for size in sizes), alpha) for name, sizes in SHAPES.items()}


def dense(layer):
    """The update as one matrix, in numpy's float64."""
    rank = layer.stored_down.shape[0]
    scale = 1.0 if layer.alpha is None else layer.alpha / rank
    return scale * layer.stored_up.double().numpy().reshape(-1, rank) @ layer.stored_down.double().numpy().reshape(rank, -1)


def alike(first, second, tolerance=1e-9):
    assert first.layers == second.layers and first.shapes.tolist() == second.shapes.tolist()
    for name in ("units", "norms", "entropies"):
        torch.testing.assert_close(getattr(first, name).double(), getattr(second, name).double(), rtol=tolerance, atol=tolerance)


def projected(width, end):
    """What the file format promises: numpy's frozen generator, seeded with version, width and end."""
    return np.random.RandomState([VERSION, width, end]).standard_normal((SIDE, width)) / math.sqrt(SIDE)


@pytest.mark.parametrize("alpha", [None, 2.5, -3.0])
def test_a_sketch_is_the_dense_update_between_two_gaussians(alpha):
    layers = lora(alpha=alpha)
    result = sketched(layers)
    assert result.layers == tuple(SHAPES) and result.units.dtype == torch.float64
    for index, layer in enumerate(layers.values()):
        update = dense(layer)
        assert tuple(result.shapes[index].tolist()) == update.shape
        expected = projected(update.shape[0], 1) @ update @ projected(update.shape[1], 0).T
        np.testing.assert_allclose(result.units[index].numpy() * result.norms[index].item(), expected, rtol=1e-9, atol=1e-9 * np.linalg.norm(update))
        shares = np.linalg.svd(update, compute_uv=False) ** 2
        assert result.norms[index].item() == pytest.approx(math.sqrt(shares.sum()), rel=1e-9)
        shares = shares[shares > 1e-6 * shares[0]]
        shares /= shares.sum()
        entropies = [2 * np.log(np.sqrt(shares).sum()), -(shares * np.log(shares)).sum(), -np.log((shares**2).sum()), -np.log(shares.max())]
        np.testing.assert_allclose(result.entropies[index].numpy(), entropies, atol=1e-9)


def test_projections_are_pinned():
    """Sketches are kept: another stream of numbers would make all of them worthless without a word."""
    np.testing.assert_allclose(projection(320, "in")[0, :3].numpy(), [0.012318646500009599, -0.22017554063127837, -0.4021388339870008], rtol=1e-12)
    assert not torch.equal(projection(320, "in"), projection(320, "out"))


def rewritten(layer, change, rng):
    """The same update as other factors."""
    down, up, rank = layer.stored_down, layer.stored_up, layer.rank
    turn = torch.randn(rank, rank, generator=rng, dtype=torch.float64) + 2 * torch.eye(rank, dtype=torch.float64)
    order = torch.randperm(rank, generator=rng)
    return {
        "basis": Factors(torch.einsum("rs,s...->r...", torch.linalg.inv(turn), down), torch.einsum("or...,rs->os...", up, turn), layer.alpha),
        "padding": Factors(torch.cat([down, torch.zeros_like(down)]), torch.cat([up, torch.zeros_like(up)], 1), 2 * layer.alpha),
        "order of ranks": Factors(down[order], up[:, order], layer.alpha),
        "alpha": Factors(down * 4, up / 4 * layer.alpha / rank, None),
    }[change]


@pytest.mark.parametrize("change", ["basis", "padding", "order of ranks", "alpha"])
def test_a_sketch_depends_on_the_updates_alone(change):
    layers, rng = lora(alpha=2.0), torch.Generator().manual_seed(9)
    alike(sketched(layers), sketched({name: rewritten(layer, change, rng) for name, layer in layers.items()}))


def test_a_sketch_does_not_depend_on_the_order_of_layers():
    first, second = sketched(lora()), sketched(dict(reversed(lora().items())))
    assert second.layers == first.layers[::-1]
    torch.testing.assert_close(second.matrices(first.layers), first.matrices(first.layers), rtol=0, atol=0)
    assert first.cosine(second) == pytest.approx(1.0)


def test_a_layer_without_effect_is_as_if_it_were_not_there():
    layers = lora()
    silent = layers | {"zero": Factors(torch.randn(2, 8).double(), torch.zeros(5, 2).double()), "off": replace(layers["linear"], alpha=0.0)}
    alike(sketched(silent), sketched(layers))
    nothing = sketched({"zero": silent["zero"]})
    assert nothing.layers == () and nothing.cosine(sketched(layers)) == 0.0 == nothing.figures.strength
    assert unpacked(packed(nothing)).layers == ()


def test_the_sketch_of_a_sum_is_the_sum_of_sketches():
    first, second = lora(1, alpha=2.0), lora(2, alpha=-1.0)
    total = {name: Factors(torch.cat([first[name].down, second[name].down]), torch.cat([first[name].up, second[name].up], 1)) for name in SHAPES}
    matrices = [sketched(part).matrices(list(SHAPES)) for part in (first, second, total)]
    torch.testing.assert_close(matrices[0] + matrices[1], matrices[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_the_kind_of_number_changes_a_sketch_by_its_rounding_alone(dtype, tolerance):
    first, second = sketched(lora()), sketched(lora(dtype=dtype))
    assert second.units.dtype == torch.float32
    assert (first.units - second.units).abs().max() < tolerance and ((first.norms / second.norms).log().abs() < tolerance).all()
    assert (first.entropies - second.entropies).abs().max() < 5 * tolerance
    assert first.cosine(second) > 1 - tolerance**2 * 4 - 1e-9


@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1e12])
def test_numbers_whose_squares_single_precision_does_not_hold(scale):
    plain, extreme = sketched(lora(dtype=torch.float32)), sketched(lora(dtype=torch.float32, scale=scale))
    assert extreme.layers == plain.layers
    torch.testing.assert_close(extreme.units, plain.units, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extreme.norms / scale**2, plain.norms, rtol=1e-4, atol=0)
    torch.testing.assert_close(extreme.entropies, plain.entropies, rtol=1e-3, atol=1e-4)


def test_inner_products_are_estimated_without_bias():
    """24 layers of three shapes, LoRAs from far apart to nearly the same."""
    rng = torch.Generator().manual_seed(0)
    common = [torch.randn(size, generator=rng) for size in ((2, 90), (70, 2))]
    loras = []
    for seed in range(8):
        amount = seed / 8
        loras.append({f"layer {index}": Factors(torch.cat([torch.randn(2, 90 + 10 * (index % 3), generator=rng), torch.cat([common[0], torch.zeros(2, 10 * (index % 3))], 1)]),
                                                torch.cat([torch.randn(70, 2, generator=rng) * (1 - amount), common[1] * amount], 1)) for index in range(24)})  # fmt: skip
    sketches = [sketched(layers, side=8) for layers in loras]
    errors = [sketches[a].inner(sketches[b]) / (sketches[a].norms.norm() * sketches[b].norms.norm()).item() - singular.cosine(loras[a], loras[b])
              for a in range(8) for b in range(a)]  # fmt: skip
    exact = [singular.cosine(loras[a], loras[b]) for a in range(8) for b in range(a)]
    assert max(exact) > 0.8 and min(exact) < 0.05
    cosines = [sketches[a].cosine(sketches[b]) for a in range(8) for b in range(a)]
    assert np.sqrt(np.mean(np.square(errors))) < 0.08 and abs(np.mean(errors)) < 0.08
    assert np.corrcoef(cosines, exact)[0, 1] > 0.98
    assert sketches[3].cosine(sketches[3]) == pytest.approx(1.0)


def test_a_sketch_shrinks_to_what_a_smaller_one_would_be():
    alike(sketched(lora()).shrunk(5), sketched(lora(), side=5))
    with pytest.raises(ValueError, match="side 32"):
        sketched(lora()).shrunk(33)


def test_figures_are_those_of_the_singular_values():
    layers = lora()
    assert vars(sketched(layers).figures) == pytest.approx(vars(singular.figures(layers)), rel=1e-6)


def test_a_packed_sketch_comes_back():
    result = replace(sketched(lora()), family="sd", tensor_sha256="ab" * 32)
    again = unpacked(packed(result))
    assert (again.layers, again.family, again.tensor_sha256) == (result.layers, "sd", "ab" * 32)
    assert torch.equal(again.norms, result.norms) and torch.equal(again.shapes, result.shapes)
    assert (again.units - result.units).abs().max() < 2e-3 and (again.entropies - result.entropies).abs().max() < 2e-3


@pytest.mark.parametrize("change", ["cut", "other", "empty", "version", "lengths"])
def test_what_is_no_sketch_is_refused(change, monkeypatch):
    data = packed(sketched(lora()))
    if change == "version":
        monkeypatch.setattr("retrieval.sketch.VERSION", VERSION + 1)
    if change == "lengths":
        data = packed(replace(sketched(lora()), norms=torch.ones(1, dtype=torch.float64)))
    with pytest.raises(ValueError, match="sketch"):
        unpacked({"cut": data[:-9], "other": b"x" * 100, "empty": b""}.get(change, data))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_every_spelling_of_a_lora_has_one_sketch(family, tmp_path):
    pipe = getattr(toys, family)()
    components = {name: module for name in ("unet", "text_encoder", "text_encoder_2") if (module := getattr(pipe, name, None)) is not None}
    updates = lora_writers.updates(pipe, alphas=(2.0, 1.0), every=3)
    results = {}
    for name, write in lora_writers.WRITERS.items():
        path = lora_writers.save(tmp_path / f"{name}.safetensors", write(pipe, updates))
        results[name] = sketch(path, components, family)
    first = results["peft"]
    assert len(first.layers) == len(updates) and first.units.dtype == torch.float64
    expected = {f"{update.component}.{update.path.removeprefix('text_model.')}": update.dense().flatten(1) for update in updates}
    for name, matrix in zip(first.layers, first.matrices(first.layers), strict=True):
        rows, columns = expected[name].shape
        torch.testing.assert_close(matrix, torch.from_numpy(projected(rows, 1)) @ expected[name] @ torch.from_numpy(projected(columns, 0)).T)
    for result in results.values():
        alike(result, first)


# Component, path, the name of the original code, shapes of down and up, and the rows of up where the original code has several layers in one.
REAL = {
    "sd": [("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "input_blocks_4_1_transformer_blocks_0_attn2_to_k", (2, 768), 640),
           ("unet", "mid_block.resnets.0.conv1", "middle_block_0_in_layers_2", (2, 1280, 3, 3), 1280),
           ("text_encoder", "encoder.layers.3.mlp.fc1", "text_model_encoder_layers_3_mlp_fc1", (2, 768), 3072)],
    "sdxl": [("unet", "up_blocks.0.attentions.1.transformer_blocks.7.ff.net.2", "output_blocks_1_1_transformer_blocks_7_ff_net_2", (2, 5120), 1280),
             ("unet", "down_blocks.1.downsamplers.0.conv", "input_blocks_6_0_op", (2, 640, 3, 3), 640),
             ("text_encoder_2", "encoder.layers.31.self_attn.q_proj", "text_model_encoder_layers_31_self_attn_q_proj", (2, 1280), 1280)],
}  # fmt: skip


@pytest.mark.parametrize("family", REAL)
def test_real_names_of_both_codes_have_one_sketch(family, tmp_path):
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_" if family == "sd" else "lora_te1_", "text_encoder_2": "lora_te2_"}
    rng = torch.Generator().manual_seed(0)
    ours, theirs = {}, {}
    for component, path, original, down, outputs in REAL[family]:
        factors = torch.randn(down, generator=rng), torch.randn(outputs, 2, *(1 for _ in down[2:]), generator=rng)
        ours |= dict(zip((f"{component}.{path}.lora_A.weight", f"{component}.{path}.lora_B.weight"), factors, strict=True))
        head = prefixes[component] + original
        theirs |= {f"{head}.lora_down.weight": factors[0], f"{head}.lora_up.weight": factors[1], f"{head}.alpha": torch.tensor(2.0)}
    components = skeleton.of_family(family)
    results = []
    for name, tensors in (("ours", ours), ("theirs", theirs)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        results.append(sketch(tmp_path / f"{name}.safetensors", components, family))
    assert set(results[0].layers) == {f"{component}.{path}" for component, path, *_ in REAL[family]}
    alike(*results)


def test_flux_layers_in_one_are_sketched_apart(tmp_path):
    rng = torch.Generator().manual_seed(0)
    double, single = "double_blocks.18.txt_attn.qkv", "single_blocks.37.linear1"
    fused = {double: (torch.randn(2, 3072, generator=rng), torch.randn(9216, 2, generator=rng)),
             single: (torch.randn(2, 3072, generator=rng), torch.randn(21504, 2, generator=rng))}  # fmt: skip
    apart = {}
    for name, parts in ((double, ["transformer_blocks.18.attn.add_q_proj", "transformer_blocks.18.attn.add_k_proj", "transformer_blocks.18.attn.add_v_proj"]),
                        (single, [f"single_transformer_blocks.37.{end}" for end in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])):  # fmt: skip
        down, up = fused[name]
        for part, rows in zip(parts, up.split([3072, 3072, 3072, 12288][: len(parts)]), strict=True):
            apart |= {f"transformer.{part}.lora_A.weight": down.clone(), f"transformer.{part}.lora_B.weight": rows.clone()}
    kohya = {f"lora_unet_{name.replace('.', '_')}.lora_{role}.weight": factor for name, pair in fused.items() for role, factor in zip(("down", "up"), pair, strict=True)}
    bfl = {f"diffusion_model.{name}.lora_{role}.weight": factor for name, pair in fused.items() for role, factor in zip("AB", pair, strict=True)}
    components = skeleton.of_family("flux")
    results = []
    for name, tensors in (("apart", apart), ("kohya", kohya), ("bfl", bfl)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        results.append(sketch(tmp_path / f"{name}.safetensors", components, "flux"))
    assert len(results[0].layers) == 7 and results[0].family == "flux"
    alike(results[0], results[1], 1e-5)
    alike(results[0], results[2], 1e-5)


def test_without_a_base_layers_have_the_files_names(tmp_path):
    pipe = toys.sd()
    updates = lora_writers.updates(pipe, every=5)
    results = []
    for name in ("peft", "kohya", "linear-layer"):
        path = lora_writers.save(tmp_path / f"{name}.safetensors", lora_writers.WRITERS[name](pipe, updates))
        results.append(sketch(path))
    assert "unet.down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v" in results[0].layers
    assert {name.partition(".")[2].startswith("text_model") for name in results[0].layers} == {False}
    order = sorted(results[0].layers)
    for result in results:
        assert sorted(result.layers) == order
        torch.testing.assert_close(result.matrices(order), results[0].matrices(order))


def test_a_file_is_read_once_and_only_for_its_base(tmp_path, monkeypatch):
    pipe, foreign = toys.sd(), toys.flux()
    path = toys.lora(pipe, tmp_path / "owl.safetensors")
    components = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    with pytest.raises(Refused, match="made for"):
        sketch(path, {"transformer": foreign.transformer}, "flux")
    raw = load_safely(path)
    expected = sketch(path, components, "sd")
    assert expected.tensor_sha256 == raw.tensor_sha256
    monkeypatch.setattr("retrieval.sketch.load_safely", lambda path: pytest.fail("read again"))
    monkeypatch.setattr("composition.loras.reader.load_safely", lambda path: pytest.fail("read again"))
    alike(sketch(path, components, "sd", raw=raw), expected)
    assert sketch(Path("owl.safetensors"), raw=raw).tensor_sha256 == raw.tensor_sha256
