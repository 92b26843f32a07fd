"""Singular values and inner products from factors, against the dense updates."""

import numpy as np
import pytest
import torch

from composition.loras import reader
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import load_safely
from retrieval import singular
from tests.hostile import seeds

SHAPES = {"linear": ((4, 24), (18, 4)), "convolution": ((3, 6, 3, 3), (10, 3, 1, 1)), "one rank": ((1, 9), (7, 1)), "rank over width": ((9, 4), (6, 9))}


def factors(shape, seed=0, alpha=None, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(size, generator=rng, dtype=torch.float64) for size in SHAPES[shape])
    return Factors(down.to(dtype), up.to(dtype), alpha)


def dense(layer):
    """The update as one matrix, in numpy's float64."""
    scale = 1.0 if layer.alpha is None else layer.alpha / layer.stored_down.shape[0]
    return scale * layer.stored_up.double().numpy().reshape(layer.stored_up.shape[0], -1) @ layer.stored_down.double().numpy().reshape(layer.rank, -1)


@pytest.mark.parametrize("alpha", [None, 2.5, -3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_dense_update(shape, alpha):
    layer = factors(shape, alpha=alpha)
    expected = np.linalg.svd(dense(layer), compute_uv=False)
    values = singular.values(layer).numpy()
    assert len(values) == layer.rank and (np.diff(values) <= 1e-12).all()
    size = min(len(values), len(expected))
    np.testing.assert_allclose(values[:size], expected[:size], rtol=1e-7, atol=1e-7 * expected[0])
    assert (values[size:] < 1e-7 * expected[0]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_inner_products_are_those_of_the_dense_updates(shape):
    first, second = factors(shape, 1, alpha=2.0), factors(shape, 2, alpha=0.5)
    assert singular.inner(first, second) == pytest.approx((dense(first) * dense(second)).sum(), rel=1e-12)
    assert singular.inner(first, first) == pytest.approx(np.linalg.norm(dense(first)) ** 2, rel=1e-12)


def test_updates_of_other_shapes_have_nothing_in_common():
    assert singular.inner(factors("linear"), factors("one rank")) == 0.0


@pytest.mark.parametrize("change", ["basis", "padding", "order", "scale"])
def test_what_is_computed_depends_on_the_update_alone(change):
    layer, other = factors("linear", alpha=4.0), factors("linear", 3)
    down, up = layer.stored_down, layer.stored_up
    rng = torch.Generator().manual_seed(9)
    turn = torch.randn(4, 4, generator=rng, dtype=torch.float64)
    again = {
        "basis": Factors(torch.linalg.inv(turn) @ down, up @ turn, 4.0),
        "padding": Factors(torch.cat([down, torch.zeros(3, 24)]).double(), torch.cat([up, torch.zeros(18, 3)], 1).double(), 7.0),
        "order": Factors(down[[2, 0, 3, 1]], up[:, [2, 0, 3, 1]], 4.0),
        "scale": Factors(down * 1e6, up * 1e-6, 4.0),
    }[change]
    torch.testing.assert_close(singular.values(again)[:4], singular.values(layer), rtol=1e-6, atol=1e-9)
    assert singular.inner(again, other) == pytest.approx(singular.inner(layer, other), rel=1e-9)
    a, b = (singular.figures({"x": each, "y": other}) for each in (layer, again))
    assert (a.strength, a.effective_rank, a.spike) == pytest.approx((b.strength, b.effective_rank, b.spike), rel=1e-6)


def test_cosine_of_files_is_that_of_all_their_entries():
    first = {"a": factors("linear", 1), "b": factors("convolution", 2, alpha=9.0)}
    second = {"b": factors("convolution", 3, alpha=1.0), "a": factors("linear", 1), "c": factors("one rank", 4)}
    vectors = [{name: dense(layer).ravel() for name, layer in file.items()} for file in (first, second)]
    dot = sum((vectors[0][name] * vectors[1][name]).sum() for name in ("a", "b"))
    norms = [np.sqrt(sum((vector**2).sum() for vector in file.values())) for file in vectors]
    assert singular.cosine(first, second) == pytest.approx(dot / norms[0] / norms[1], rel=1e-12)
    assert singular.cosine(first, first) == pytest.approx(1.0, abs=1e-12)
    assert singular.cosine(first, {"a": Factors(-first["a"].stored_down, first["a"].stored_up), "b": first["b"]}) < 1
    assert singular.cosine(first, {"c": factors("one rank")}) == singular.cosine(first, {}) == singular.cosine({}, {}) == 0.0


def test_figures_of_known_updates():
    even = Factors(torch.eye(4, 6, dtype=torch.float64), torch.eye(5, 4, dtype=torch.float64))
    alone = Factors(torch.ones(1, 6, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64))
    none = Factors(torch.zeros(2, 6), torch.ones(5, 2))
    got = singular.figures({"x": even, "z": none})
    assert (got.strength, got.effective_rank, got.spike) == pytest.approx((2.0, 4.0, 0.25))
    got = singular.figures({"x": alone})
    assert (got.strength, got.effective_rank, got.spike) == pytest.approx((30**0.5, 1.0, 1.0))
    assert singular.figures({"z": none}) == singular.figures({}) == singular.Figures()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_halves_are_widened_before_anything_is_computed(dtype):
    layer = factors("linear", dtype=dtype)
    np.testing.assert_allclose(singular.values(layer).numpy(), np.linalg.svd(dense(layer), compute_uv=False)[:4], rtol=1e-7)


def test_the_factors_of_a_file_without_a_base(tmp_path):
    path = tmp_path / "owl.safetensors"
    broken = {f"{seeds.K}_b.lora_down.weight": torch.ones(2, 8), f"{seeds.K}_b.lora_up.weight": torch.ones(8, 3), "x.lora_down.weight": torch.ones(2, 2)}
    path.write_bytes(seeds.lora(seeds.pair() | broken))
    layers = reader.unplaced(path, load_safely(path))
    assert set(layers) == {f"unet.{name.removeprefix('lora_unet_')}" for name in (seeds.Q, seeds.K)}
    layer = layers[f"unet.{seeds.Q.removeprefix('lora_unet_')}"]
    assert layer.alpha == 1.0 and layer.scale == 0.5
    np.testing.assert_allclose(singular.values(layer).numpy(), np.linalg.svd(dense(layer), compute_uv=False)[:2], atol=1e-8)
