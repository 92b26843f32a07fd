"""AutoLoRA's gates against their formulas worked out by hand, on toys in float64."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from composition import Refused, methods
from composition.methods import autolora
from composition.methods.shared import gating
from tests.composition import laws
from tests.gates import drawn_gates

KINDS = [("layer", {"film": False}), ("rank", {"film": True}), ("rank", {"film": False}), ("element", {"film": False}), ("element", {"film": False, "shared": True})]
NAMES = ["layer", "rank with time", "rank", "element", "element with global LoRA"]


@pytest.fixture(params=["sd", "flux"])
def case(request, engines, lora_files):
    loras = laws.loras_of(lora_files[request.param])
    return engines[request.param], [replace(lora, category=kind) for lora, kind in zip(loras, ("character", "style", "place"), strict=True)]


def written(engine, loras, file, kind, drawn=True, **design):
    """A file of gates for this engine: with random parameters, or as gates begin."""
    with laws.opened(engine, laws.request("merge", *loras)) as (run, times, start):
        gates = drawn_gates(run, kind, **design)
    if not drawn:
        gates = gating.Gating(gates.design)
    return str(gating.write(gates, file))


@pytest.mark.parametrize(("kind", "design"), KINDS[:4], ids=NAMES[:4])
def test_gates_begin_as_merge(case, kind, design, tmp_path):
    engine, loras = case
    file = written(engine, loras, tmp_path / "gates.safetensors", kind, drawn=False, **design)
    laws.same(laws.latents(engine, laws.request("autolora", *loras, options={"gates": file})), laws.merged(engine, *loras), 1e-6)


@pytest.mark.parametrize(("kind", "design"), KINDS[:3], ids=NAMES[:3])
def test_one_lora_stays_whole(case, kind, design, tmp_path):
    engine, loras = case
    file = written(engine, loras, tmp_path / "gates.safetensors", kind, **design)
    laws.same(laws.latents(engine, laws.request("autolora", loras[0], options={"gates": file})), laws.merged(engine, loras[0]), 1e-6)
    laws.differ(laws.latents(engine, laws.request("autolora", *loras, options={"gates": file})), laws.merged(engine, *loras))


@pytest.mark.parametrize(("kind", "design"), KINDS, ids=NAMES)
def test_the_order_of_loras_does_not_matter(case, kind, design, tmp_path):
    engine, loras = case
    file = written(engine, loras, tmp_path / "gates.safetensors", kind, **design)
    first, second = (laws.latents(engine, laws.request("autolora", *order, options={"gates": file})) for order in (loras, loras[::-1]))
    laws.same(first, second, 1e-6)


def test_how_a_lora_acts_is_read_off_its_outputs(case):
    """The features of the kind "rank", from every LoRA's output made at full width."""
    engine, loras = case
    with laws.opened(engine, laws.request("merge", *loras)) as (run, times, start):
        path, layer = next((path, layer) for path, layer in run.adapters.stacks().items() if all(layer.touches(k) for k in range(3)))
        ranks = torch.randn(2, 6, layer.spans[-1][1], dtype=torch.float64)
        ranks[..., slice(*layer.spans[1])] = 0  # the second is off
        up = layer.product(ranks).up
        outputs = [ranks[..., slice(*span)] @ up[:, slice(*span)].T for span in layer.spans]
        features = gating.Gating.features(layer, ranks, [0, 2])
        own = torch.stack([outputs[k].square().sum(-1) for k in (0, 2)], -1)
        total = ranks @ up.T
        cosine = torch.stack([F.cosine_similarity(outputs[k], total, dim=-1) for k in (0, 2)], -1)
        torch.testing.assert_close(features[..., 0], (own / own.mean(1, keepdim=True)).log() / 4)
        torch.testing.assert_close(features[..., 1], 2 * own / own.sum(-1, keepdim=True) - 1)
        torch.testing.assert_close(features[..., 2], cosine)
        loud = own.mean(1, keepdim=True)
        torch.testing.assert_close(features[..., 3], ((loud / loud.mean(-1, keepdim=True)).log() / 4).expand_as(own))
        assert torch.allclose(features[..., 4], torch.tensor(2.0).log().double() / 2)


def test_another_factorisation_has_the_same_gates(case):
    """B M^-1 and M A in place of B and A: the answer depends on the update alone."""
    engine, loras = case
    with laws.opened(engine, laws.request("merge", *loras)) as (run, times, start):
        gates = drawn_gates(run).double()
        path, layer = next((path, layer) for path, layer in run.adapters.stacks().items() if layer.touches(0) and layer.touches(1))
        span, ranks = slice(*layer.spans[0]), torch.randn(2, 6, layer.spans[-1][1], dtype=torch.float64)
        route, gate = gates.route(["character", "style", "place"]), torch.ones(layer.spans[-1][1], dtype=torch.float64)
        before = route(layer, laws.Step(0, 4, torch.tensor(300.0), start), ranks, gate)
        matrix = torch.randn(span.stop - span.start, span.stop - span.start, dtype=torch.float64)
        product, other = layer.product(ranks), ranks.clone()
        other[..., span] = ranks[..., span] @ matrix.T
        up = product.up.clone()
        up[:, span] = product.up[:, span] @ torch.linalg.inv(matrix)
        layer._product = product._replace(up=up)
        torch.testing.assert_close(route(layer, laws.Step(0, 4, torch.tensor(300.0), start), other, gate), before)
        layer._product = None


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "with global LoRA"])
@pytest.mark.parametrize("grid", [False, True], ids=["tokens", "grid"])
def test_the_published_gate(case, shared, grid):
    """sigma(w_l LN(h_k) + w_c LN(h_0) LN(h_k) + beta), times w_o, place by place and LoRA by LoRA in a loop."""
    engine, loras = case
    with laws.opened(engine, laws.request("merge", *loras)) as (run, times, start):
        gates = drawn_gates(run, "element", film=False, shared=shared).double()
        path = sorted(run.adapters.stacks())[0]
        width = gates.design.layers[path]
        base, each = torch.randn(2, 3, 5, width, dtype=torch.float64), torch.randn(3, 2, 3, 5, width, dtype=torch.float64)
        top = torch.linalg.qr(torch.randn(width, 2, dtype=torch.float64)).Q
        w_l, w_c, w_o, beta, bias_0, weight_0, bias_1, weight_1 = gates._rows(path, base)
        extra = [(each.sum(0) @ top) @ top.T] if shared else []
        expected = base.clone()
        for h in (*each, *extra):
            for row in range(2):
                for y in range(3):
                    for x in range(5):
                        n_0 = F.layer_norm(base[row, y, x], (width,), weight_0, bias_0)
                        n_k = F.layer_norm(h[row, y, x], (width,), weight_1, bias_1)
                        gate = 1 / (1 + torch.exp(-(w_l * n_k + w_c * n_0 * n_k + beta)))
                        expected[row, y, x] += w_o * gate * h[row, y, x]
        step = laws.Step(0, 4, torch.tensor(300.0), start)
        combine = gates.combine(lambda name: top)
        if grid:
            out = combine(path, step, base.movedim(-1, 1), each.movedim(-1, 2)).movedim(1, -1)
        else:
            out = combine(path, step, base.flatten(1, 2), each.flatten(2, 3)).unflatten(1, (3, 5))
        torch.testing.assert_close(out, expected)


def test_the_global_lora_is_the_best_of_its_rank(case):
    engine, loras = case
    with laws.opened(engine, laws.request("merge", *loras)) as (run, times, start):
        path, layer = next((path, layer) for path, layer in run.adapters.stacks().items() if all(layer.touches(k) for k in range(3)))
        factors, weights = layer.stored(), torch.linspace(0.5, 1.5, layer.spans[-1][1], dtype=torch.float64)
        dense = (factors.up.double() * weights) @ factors.down.double().flatten(1)
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        top = gating.directions(layer, weights)
        torch.testing.assert_close(top @ (top.T @ dense), (left[:, :2] * values[:2]) @ right[:2])


def test_constant_gates_are_folded_and_scale_each_lora(case, tmp_path, monkeypatch):
    """The kind "layer" is Merge with a weight for each LoRA and layer: exp(c - max c), c by category."""
    engine, loras = case
    file = written(engine, loras, tmp_path / "gates.safetensors", "layer", film=False)
    asked = laws.request("autolora", *loras, options={"gates": file})
    folded = laws.latents(engine, asked)
    monkeypatch.setattr(engine, "fold", False)
    laws.same(folded, laws.latents(engine, asked), 1e-9)
    gates = gating.read(tmp_path / "gates.safetensors").double()
    with laws.opened(engine, asked) as (run, times, start):
        weights = run.live(laws.Step(0, 4, times[0], start))
        run.categories = dict(zip(run.names, ("character", "style", "place"), strict=True))
        for path, layer in run.adapters.stacks().items():
            touching = [k for k in range(3) if layer.touches(k)]
            values = gates.table[gates.places[path], [2, 1, 0]]  # of the character, the style and the place
            scale = torch.tensor([float((values[k] - values[touching].max()).exp()) if k in touching else 1.0 for k in range(3)]).double()
            layer.rewrite(autolora._scaling(scale))
        expected = run.guide(run.denoise(laws.Step(0, 4, times[0], start), weights))
        with methods.find("autolora").compose(run, autolora.Options(file)) as predict:
            laws.same(predict(laws.Step(0, 4, times[0], start)).value, expected, 1e-6)


def test_notes_have_the_gates_by_layer_and_step(case):
    engine, loras = case
    notes = engine.run(laws.request("autolora", *loras)).notes["autolora"]
    assert notes["kind"] == "rank" and [row["step"] for row in notes["steps"]] == list(range(laws.STEPS))
    assert all(0 < value <= 1 for row in notes["steps"] for gates in row["gates"].values() for value in gates)
    assert any(len(gates) == 3 for gates in notes["steps"][0]["gates"].values())


def test_gates_of_another_base_are_refused(engines, lora_files, tmp_path):
    """In words that name both bases, the layer and what to do; no gates for a model, a damaged file and another kind of file, too."""
    sd, flux = (laws.loras_of(lora_files[family]) for family in ("sd", "flux"))
    file = written(engines["sd"], sd, tmp_path / "gates.safetensors", "rank")
    with pytest.raises(Refused, match="another base than toy: .* does not have .*`medley train gates`"):
        engines["flux"].run(laws.request("autolora", *flux, options={"gates": file}))
    gates = gating.read(tmp_path / "gates.safetensors")
    wide = gating.Gating(replace(gates.design, layers={path: 2 * width for path, width in gates.design.layers.items()}))
    gating.write(wide, tmp_path / "wide.safetensors")
    with pytest.raises(Refused, match="wide, not"):
        engines["sd"].run(laws.request("autolora", *sd, options={"gates": str(tmp_path / "wide.safetensors")}))
    with pytest.raises(Refused, match="no file of gates"):
        engines["sd"].run(laws.request("autolora", *sd, options={"gates": sd[0].source}))
    cut = shutil.copy(file, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    with pytest.raises(Refused):
        engines["sd"].run(laws.request("autolora", *sd, options={"gates": str(cut)}))


def test_no_gates_for_a_model(engines, lora_files, monkeypatch):
    monkeypatch.undo()
    engine, loras = engines["sd"], laws.loras_of(lora_files["sd"])
    with pytest.raises(Refused, match="no gates are bundled with toy: train some"):
        engine.run(laws.request("autolora", *loras))
    assert isinstance(engine.run(laws.request("autolora", loras[0])).request.seed, int), "one LoRA needs none"
