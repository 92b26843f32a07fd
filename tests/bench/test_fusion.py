"""What the benchmark of fusion measures is what it says: on toys, laws alone and no times."""

import pytest
import torch

from composition import methods
from tests.bench.fusion import METHODS, Bench, main, measured
from tests.gpu.models import TOYS, Model, gap

STATIC = sorted(name for name, method in methods.all().items() if method.static)


@pytest.fixture(params=["sd", "flux"])
def bench(request, tmp_path):
    size = next(size for size in TOYS if size.family == request.param)
    model = Model(size, "cpu", torch.float32)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    with torch.no_grad(), Bench(model, 2, tmp_path) as opened:
        yield opened
    assert all(torch.equal(value, before[name]) for name, value in model.denoiser.state_dict().items())


def test_what_is_folded_answers_as_what_is_live(bench):
    for name in STATIC:
        row = measured(bench, name, 1)
        assert row.folded is not None and row.gap is not None and row.gap < 1e-4, name
        assert row.evaluations == (2 if name == "ssr" else 0), name


def test_the_rivals_are_the_base_and_merge(bench):
    with bench.method("merge") as (_, predict):
        live = bench.backbone.denoise(bench.latents, bench.t, bench.cond)  # nothing is on yet
        assert gap(bench.bare(), live) < 1e-5 < gap(bench.merge(), live)
        predict(bench.step(0))
        assert gap(bench.backbone.denoise(bench.latents, bench.t, bench.cond), bench.merge()) < 1e-5


def test_methods_that_are_not_there_are_skipped(capsys):
    main(["--tiny", "--family", "flux", "--counts", "2", "--rounds", "1", "--methods", "np-lora,yet-to-come"])
    said = capsys.readouterr().out
    assert "skipped, for there are no such methods: yet-to-come" in said
    assert "flux, K = 2, np-lora: folded" in said and "bar of 1.01 of the base folded:" in said and len(set(METHODS)) == len(METHODS)
