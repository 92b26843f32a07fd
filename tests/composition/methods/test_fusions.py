"""SSR-Merge and NP-LoRA against least squares and projections worked out by hand, on toys in float64."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composition import Lora, prompts
from composition.methods.shared import concepts, projection, ssr
from composition.profiles.store import ProfileStore
from tests.composition import laws

EYE = torch.eye(5, dtype=torch.float64)


@pytest.fixture(params=["sd", "flux"])
def case(request, engines, lora_files):
    loras = laws.loras_of(lora_files[request.param])
    engine = engines[request.param]
    return engine, [replace(lora, category=kind) for lora, kind in zip(loras, ("character", "style", "object"), strict=True)]


def rows_of(module, x):
    """Every input row of a layer: tokens, or the patches of a convolution."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def test_r_is_the_least_squares_optimum():
    """One LoRA: the identity; none worse than adding up; ranks that are never used together: no mixing."""
    torch.manual_seed(0)
    up, spans = torch.randn(9, 5, dtype=torch.float64), ((0, 2), (2, 5))
    rows = [torch.randn(40, 5, dtype=torch.float64) for _ in spans]
    sums = ssr.Sums.empty(5)
    for z, span in zip(rows, spans, strict=True):
        sums.add(z, span)
    matrix = sums.solved(0.0)
    z = torch.cat(rows)
    goal = torch.cat([torch.cat([rows[0][:, :2], torch.zeros(40, 3)], 1), torch.cat([torch.zeros(40, 2), rows[1][:, 2:]], 1)]).double()
    torch.testing.assert_close(matrix, torch.linalg.lstsq(z, goal).solution.T)
    owner = torch.tensor([0, 0, 1, 1, 1])

    def wrong(r):
        return sum(((z @ r.T - part) @ up.T).square().sum() for z, part in zip(rows, goal.split(40), strict=True))

    for r in (matrix, EYE, torch.randn_like(EYE)):
        torch.testing.assert_close(sums.error(r, up) + sums.alone(up, owner), float(wrong(r)))
    assert sums.error(matrix, up) < sums.error(EYE, up)

    alone = ssr.Sums.empty(5)
    alone.add(rows[0], (0, 5))
    torch.testing.assert_close(alone.solved(1e-12), EYE, atol=1e-9, rtol=0)
    apart = ssr.Sums.empty(5)
    for z, span in zip(rows, spans, strict=True):
        only = torch.zeros_like(z)
        only[:, slice(*span)] = z[:, slice(*span)]
        apart.add(only, span)
    torch.testing.assert_close(apart.solved(1e-12), EYE, atol=1e-9, rtol=0)


def test_measured_matrices_are_those_of_a_model_looked_at_by_hand(case):
    """Each LoRA written into the stock weights and asked for; every layer's inputs caught, and R from a least squares
    problem with the ridge as rows of its own. Then B R A written into the weights predicts what the method does."""
    engine, loras = case
    asked = laws.request("ssr", *(replace(lora, weight=1.0) for lora in loras[:2]), options={"ridge": 1e-3, "prompts": "request"})
    with laws.opened(engine, asked) as (run, times, start):
        layers = run.adapters.stacks()
        modules = {path: engine.backbone.denoiser.get_submodule(path) for path in layers}
        sources = {path: layer.stored() for path, layer in layers.items()}
        sources = {path: part._replace(down=part.down.double(), up=part.up.double()) for path, part in sources.items()}
        original = {path: module.weight.detach().clone() for path, module in modules.items()}
        noise = torch.randn(1, *start.shape[1:], generator=torch.Generator().manual_seed(42)) * getattr(run.scheduler, "init_noise_sigma", 1.0)
        step = laws.Step(0, len(times), times[0], noise.double())
        seen = {path: [] for path in layers}
        run.adapters.use({})
        for k, name in enumerate(run.names):
            for path, factors in sources.items():
                span = slice(*layers[path].spans[k])
                modules[path].weight += (factors.up[:, span] @ factors.down.flatten(1)[span]).view_as(original[path])
            hooks = [module.register_forward_pre_hook(lambda m, args, path=path: seen[path].append(rows_of(m, args[0])))
                     for path, module in modules.items()]
            engine.backbone.denoise(run.scaled(step), step.t, run.encode(asked.prompt, {name: 1.0}))
            for hook in hooks:
                hook.remove()
            for path, module in modules.items():
                module.weight.copy_(original[path])
        mixing = ssr.measure(run, laws.Step(0, len(times), times[0], start), run.names, [asked.prompt] * 2, 1e-3)
        run.adapters.use({})
        shared = 0
        for path, factors in sources.items():
            if factors.owner.unique().numel() < 2:
                assert path not in mixing.matrices
                continue
            z = [x @ factors.down.flatten(1).T for x in seen[path]]
            goal = torch.cat([part * (factors.owner == k) for k, part in enumerate(z)])
            z = torch.cat(z)
            ridge = (1e-3 * z.square().sum(0).mean()).sqrt() * torch.eye(z.shape[1])
            matrix = torch.linalg.lstsq(torch.cat([z, ridge]), torch.cat([goal, torch.zeros_like(ridge)])).solution.T
            torch.testing.assert_close(mixing.matrices[path], matrix, rtol=1e-6, atol=1e-7)
            modules[path].weight += (factors.up @ matrix @ factors.down.flatten(1)).view_as(original[path])
            shared += 1
        assert shared and mixing.error < mixing.merged
        for path, factors in sources.items():
            if path not in mixing.matrices:
                modules[path].weight += (factors.up @ factors.down.flatten(1)).view_as(original[path])
        cond = run.encode(use={name: 1.0 for name in run.names})
        expected = run.guide(engine.backbone.denoise(run.scaled(step._replace(latents=start)), times[0], cond))
        for path, module in modules.items():
            module.weight.copy_(original[path])
    laws.same(laws.prediction(engine, asked, 0), expected, 1e-6)


def test_two_equal_loras_are_one(case, tmp_path):
    """Where Merge doubles them, R lets each do half."""
    engine, loras = case
    one = replace(loras[0], text_weight=0.0)  # prompts are read with both LoRAs added up
    twins = [replace(one, source=str(shutil.copy(loras[0].source, tmp_path / f"{name}.safetensors"))) for name in ("first", "second")]
    asked = laws.request("ssr", *twins, options={"ridge": 1e-8, "prompts": "request"})
    laws.same(laws.latents(engine, asked), laws.merged(engine, one), 1e-4)


def test_weights_stay_sliders(case):
    """R does not depend on the LoRAs' weights."""
    engine, loras = case

    def notes(weight):
        return engine.run(laws.request("ssr", *(replace(lora, weight=weight) for lora in loras))).notes["ssr"]
    assert notes(0.3) == notes(1.0)


def test_measured_once_for_a_set(case, tmp_path, monkeypatch):
    """K evaluations the first time, none afterwards, in memory and from the store; a damaged file is measured again."""
    engine, loras = case
    store = ProfileStore(tmp_path)
    monkeypatch.setattr(engine, "profiles", store)
    asked = laws.request("ssr", *loras)
    plain = engine.run(replace(asked, method="merge")).notes["evaluations"]

    def measured(request):
        return engine.run(request).notes["evaluations"] - plain

    assert measured(asked) == len(loras)
    assert measured(asked) == 0
    again = laws.latents(engine, asked)
    monkeypatch.setattr(engine, "profiles", ProfileStore(tmp_path))
    assert measured(asked) == 0
    assert torch.equal(laws.latents(engine, asked), again)
    assert measured(replace(asked, loras=loras[::-1])) == len(loras), "another order is another set"
    for file in tmp_path.glob("*.ssr.safetensors"):
        file.write_bytes(file.read_bytes()[:-7])
    monkeypatch.setattr(engine, "profiles", ProfileStore(tmp_path))
    assert measured(asked) == len(loras)
    assert torch.equal(laws.latents(engine, asked), again)


@pytest.mark.parametrize("method", ["ssr", "np-lora"])
def test_folded_is_live(case, method, monkeypatch):
    engine, loras = case
    asked = laws.request(method, *loras)
    folded = laws.latents(engine, asked)
    assert engine.run(asked).notes.get("fold") is None, "in the weights"
    monkeypatch.setattr(engine, "fold", False)
    laws.same(folded, laws.latents(engine, asked))


@pytest.mark.parametrize("method", ["ssr", "np-lora"])
def test_regions_that_bind_nothing_are_the_fusion_alone(case, method):
    engine, loras = case
    laws.same(laws.latents(engine, laws.request("regions", *loras, options={"fusion": method})), laws.latents(engine, laws.request(method, *loras)))


@pytest.mark.parametrize("method", ["ssr", "np-lora"])
def test_under_masks_the_factors_are_the_fused_ones(case, method):
    """With one region that is the whole picture and one that is nowhere: the first LoRA's row of the fusion, alone."""
    engine, loras = case
    one, two = replace(loras[0], region=laws.WHOLE), replace(loras[1], region=laws.NOWHERE)
    fused = laws.latents(engine, laws.request("regions", one, two, options={"fusion": method}))
    laws.differ(fused, laws.latents(engine, laws.request("regions", one, two)))


def test_what_a_style_reads_is_left_to_it(case):
    """Every content update, written out, is B A (I - mu / (1 + mu) P), P the projection on the rows of the style's dense update."""
    engine, loras = case
    asked = laws.request("np-lora", *loras)
    with laws.opened(engine, asked) as (run, times, start):
        names = run.names
        run.categories = dict(zip(names, ("character", "style", "object"), strict=True))
        made = projection.projected(run, names, 0.5)
        assert made
        for path, layer in run.adapters.stacks().items():
            before = layer.stored()
            before = before._replace(down=before.down.double(), up=before.up.double())
            after = made[path](before) if path in made else before
            dense = [before.up[:, slice(*span)] @ before.down.flatten(1)[slice(*span)] for span in layer.spans]
            left, values, right = torch.linalg.svd(dense[1], full_matrices=False)
            right = right[values > 1e-8 * values.max()] if values.numel() and values.max() > 0 else right[:0]
            for k, span in enumerate(layer.spans):
                expected = dense[k] - (dense[k] @ right.T @ right / 3 if k != 1 else 0.0)
                torch.testing.assert_close(after.up[:, slice(*span)] @ after.down.flatten(1)[slice(*span)], expected, rtol=1e-7, atol=1e-10)


def test_merge_without_both_roles_and_at_mu_nothing(case):
    engine, loras = case
    whole = laws.merged(engine, *loras)
    laws.same(laws.latents(engine, laws.request("np-lora", *loras, options={"mu": 0.0})), whole)
    content = [replace(lora, category="object") for lora in loras]
    asked = laws.request("np-lora", *content)
    laws.same(laws.latents(engine, asked), laws.merged(engine, *content))
    assert "nothing is projected" in engine.run(asked).notes["np-lora"]
    laws.differ(laws.latents(engine, laws.request("np-lora", *loras)), whole)


def test_directions_are_the_strongest_first():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64)).Q for size in (8, 12))
    up, down = left * torch.tensor([3.0, 2.0, 0.1]), right.T
    basis = projection.directions(down, up, 0.99)
    assert basis.shape == (12, 2)
    torch.testing.assert_close(basis @ basis.T, right[:, :2] @ right[:, :2].T)
    assert projection.directions(down, up).shape == (12, 3) and projection.directions(down, up, 0.0).shape == (12, 0)
    assert projection.directions(down[[0, 0]], up[:, [0, 0]]).shape == (12, 1), "a direction said twice is one"


def test_prompts_that_a_set_is_measured_by(case):
    engine, loras = case
    with laws.opened(engine, laws.request("ssr", *loras[:2])) as (run, times, start):
        one, two = run.names
        run.triggers = {one: ("fox", "red fox"), two: ()}
        assert ssr.calibration_prompts(run, "trigger") == ["fox", two.replace("_", " ")]
        assert ssr.calibration_prompts(run, "request") == [run.request.prompt] * 2
        assert ssr.calibration_prompts(run, "own") == ["the fox and on the moon", "and the owl on the moon"]


def test_clothing_shares_its_wearers_places():
    """The character that the prompt names last before it; none before it, or no clothing: nobody shares."""
    kinds = {"fox": "character", "hat": "clothing", "rose": "object", "owl": "character", "scarf": "clothing"}
    words = {"fox": "fox", "hat": "hat", "rose": "rose", "owl": "owl", "scarf": "scarf"}

    def company(prompt):
        loras = {name: Lora(name, binds=words[name]) for name in words if name in prompt}
        scene = prompts.scene(prompt, loras, kinds, {})
        return {scene.concepts[c]: {scene.concepts[w] for w in others} for c, others in concepts.worn_by(scene, kinds).items()}

    assert company("a fox wearing a hat and a rose") == {"fox": {"hat"}, "hat": {"fox"}}
    assert company("a fox, a hat, an owl and a scarf") == {"fox": {"hat"}, "hat": {"fox"}, "owl": {"scarf"}, "scarf": {"owl"}}
    assert company("a hat and a fox") == {} and company("a fox and a rose") == {}


def test_worn_passes_have_both_loras(case):
    """In each other's pass, at their weights; without, each alone."""
    engine, loras = case
    one, two = loras[:2]
    with laws.opened(engine, laws.request("clora-fast", one, two)) as (run, times, start):
        run.categories = dict(zip(run.names, ("character", "clothing"), strict=True))
        scene = concepts.scene_of(run)
        live = run.live(laws.Step(0, 4, times[0], start))
        alone, worn = (concepts.passes_of(run, scene, live, (0, 1), worn=flag) for flag in (False, True))
        assert [set(item.use) for item in alone] == [set(), {run.names[0]}, {run.names[1]}]
        assert [item.use for item in worn] == [{}, live, live]


def test_factors_of_blocks_are_measured_apart(case):
    """A set with other factors is another measurement: what was measured before does not stand for it."""
    engine, loras = case
    block = engine.backbone.block(next(path for path in engine.backbone.prompt_attention()))
    asked = laws.request("ssr", *loras)
    first = laws.latents(engine, asked)
    changed = replace(asked, loras=[replace(loras[0], blocks={block: 0.3}), *loras[1:]])
    assert engine.run(changed).notes["evaluations"] > engine.run(asked).notes["evaluations"]
    assert torch.equal(laws.latents(engine, asked), first)
