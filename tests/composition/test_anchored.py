"""Anchored guidance: the negative row is the base's own, in every method, beside conditions; the positive row is as it always was."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from composition import Condition, Engine, Lora, methods
from composition.adapters import Adapters
from composition.loop import Step
from composition.run import Run
from tests import reference, toys
from tests.composition import laws
from tests.composition.conftest import FAMILIES, SHAPED

OPTIONS = {**laws.LIGHT, "clora": {"until": 0.5, "rounds": 0, "recompute": True}}  # latents that a method moves are those of its prediction
ORDINARY = "default", "ddim"  # samplers of one evaluation a step: of FLUX, of Stable Diffusion


@pytest.fixture(autouse=True)
def quick(request):
    """Shapes are checked where every method is gone through once."""
    if request.node.originalname != "test_every_method":
        request.getfixturevalue("shapes_unchecked")


@pytest.fixture(params=SHAPED)
def case(request, engines, lora_files):
    """An engine and three LoRAs, text encoders' parts included."""
    return engines[request.param], laws.loras_of(lora_files[request.param])


def asked(engine, method, *loras, **changes):
    sampler = ORDINARY[engine.family == "sd"]
    return laws.request(method, *loras, **({"sampler": sampler, "negative": "an owl", "options": OPTIONS.get(method, {}), "anchored": True} | changes))


# against stock pipelines with dense weights -----------------------------------------------------------------------------


def densely(pipe, loras):
    """The stock pipeline with W + sum of w B A in the place of every weight that these (file, weight) of diffusers' layout name."""
    with torch.no_grad():
        for file, weight in loras:
            tensors = load_file(file)
            for key in filter(lambda key: key.endswith("lora_A.weight"), tensors):
                component, _, path = key.removesuffix(".lora_A.weight").partition(".")
                down, up = (tensors[key.replace("lora_A", f"lora_{side}")].double() for side in "AB")
                module = getattr(pipe, component)
                names = dict(module.named_modules())
                layer = names.get(path) or names[path.removeprefix("text_model.")]
                layer.weight += weight * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    return pipe


def by_hand(family, choose, request):
    """Final latents of n + s (p - n) in every step: n by the bare pipeline, p the mean over the pipelines that choose(step) names."""
    base, (scale, call) = FAMILIES[family](dtype=torch.float64), (request.guidance, (request.prompt, request.negative))
    if family == "sd":
        base.scheduler = DDIMScheduler.from_config(base.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    with torch.no_grad():
        latents = reference._begin(base, request.steps, torch.Generator().manual_seed(request.seed), laws.SIDE)
        for index, t in enumerate(base.scheduler.timesteps):
            negative = reference._predict(base, latents, t, reference._encode(base, *call), 0.0)
            positive = sum(reference._predict(pipe, latents, t, reference._encode(pipe, *call), 1.0) for pipe in choose(index)) / len(choose(index))
            latents = base.scheduler.step(negative + scale * (positive - negative), t, latents, return_dict=False)[0]
    return latents


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Of each family: two LoRAs, pipelines with each of them in their weights, and one with both."""
    folder, ready = tmp_path_factory.mktemp("dense"), {}
    for family in SHAPED:
        make = FAMILIES[family]
        files = [toys.lora(make(dtype=torch.float64), folder / f"{family}{seed}.safetensors", seed=seed) for seed in (5, 6)]
        pairs = list(zip(files, (1.0, 0.7), strict=True))
        pipes = [densely(make(dtype=torch.float64), some) for some in (pairs[:1], pairs[1:], pairs)]
        ready[family] = [Lora(str(file), weight=weight) for file, weight in pairs], pipes
    return ready


@pytest.mark.parametrize("family", SHAPED)
@pytest.mark.parametrize("method, options, choose", [
    ("merge", {}, lambda each, both: lambda index: [both]),
    ("composite", {}, lambda each, both: lambda index: each),
    ("switch", {"tau": 2}, lambda each, both: lambda index: [each[index // 2 % 2]]),
    ("cmlora", {"dominance": False, "cache": False}, lambda each, both: lambda index: each),
    ("cmlora", {"dominance": False, "max_age": 0}, lambda each, both: lambda index: each),
], ids=["merge", "composite", "switch", "cmlora", "cmlora cached"])  # fmt: skip
def test_it_is_its_formula(family, method, options, choose, dense, engines):
    """Dense weights and stock pipelines, text encoders included: the negative prompt is encoded without LoRAs too."""
    loras, (*each, both) = dense[family]
    request = asked(engines[family], method, *loras, options=options)
    laws.same(laws.latents(engines[family], request), by_hand(family, choose(each, both), request), 1e-9)
    laws.differ(laws.latents(engines[family], request), laws.latents(engines[family], replace(request, anchored=False)))


# every method ------------------------------------------------------------------------------------------------------------


def rows_of(engine, request, steps=((0, 1.0),)):
    """(the rows that the method guided, the latents they are of) of each of these steps, (index, what the noise is multiplied by)."""
    kind, rows, answers = methods.find(request.method), [], []
    with laws.opened(engine, request) as (run, times, start), pytest.MonkeyPatch.context() as patch:
        guide = run.guide
        patch.setattr(run, "guide", lambda value: (rows.append(value), guide(value))[1], raising=False)
        with kind.compose(run, kind.read(request.options)) as predict:
            for index, scale in steps:
                answer = predict(Step(index, len(times), times[index], start * scale))
                answers.append((rows[-1], answer.latents))
    return answers


def bare(engine, request, index, latents):
    """The rows of the base without any LoRA, at latents that are given."""
    with laws.opened(engine, replace(request, loras=(), method="merge", options={}, anchored=False)) as (run, times, _):
        return run.denoise(Step(index, len(times), times[index], latents))


@pytest.mark.parametrize("method", methods.all())
def test_every_method(method, case):
    """Negative: the base's. Positive: as without the anchor. With LoRAs that have regions, and are off in some steps; one picture, passes
    one by one, or two with passes in one batch."""
    engine, loras = case
    count = 1 + (list(methods.all()).index(method) + (engine.family == "sd")) % 2
    loras = [replace(loras[0], region=(0.0, 0.0, 0.5, 1.0), end=0.5), replace(loras[1], region=(0.5, 0.0, 1.0, 1.0)), loras[2]]
    request = asked(engine, method, *loras, count=count, batched=count == 2)
    moves = method == "clora" and not engine.backbone.joint
    steps = ((0, 1.0), (1, 0.8), (3, 0.5))
    anchored, plain = rows_of(engine, request, steps), rows_of(engine, replace(request, anchored=False), steps)
    for (index, _), (rows, latents), (before, same) in zip(steps, anchored, plain, strict=True):
        assert rows.shape == before.shape and rows.shape[:2] == (2, count)
        laws.same(latents, same)
        laws.same(rows[1], before[1])
        if not moves:  # of CLoRA's own latents: below
            laws.same(rows[0], bare(engine, request, index, latents)[0])
            laws.differ(rows[0], before[0])


def test_clora_moves_latents_and_the_anchor_with_them(engines, lora_files):
    """The prediction is of the latents before a step's last update, and so is the base's; computed again after it, of those after."""
    engine, loras, seen = engines["sd"], laws.loras_of(lora_files["sd"]), []
    honest = Run._evaluate

    def noted(self, step, cond, *rest, **more):
        seen.append((step.latents, cond.rows))
        return honest(self, step, cond, *rest, **more)

    for recompute in (False, True):
        request = asked(engine, "clora", *loras, options={"rounds": 1, "stop": 0.0, "recompute": recompute})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "_evaluate", noted)
            ((rows, latents),) = rows_of(engine, request)
        of = latents if recompute else seen[-1][0]
        assert recompute or not torch.equal(of, latents)
        laws.same(rows[0], bare(engine, request, 0, of)[0])


def test_authors_maps_are_of_the_positive_row(engines, lora_files):
    """CLoRA's option reference reads maps of both rows; anchored, of the one that its LoRAs act in."""
    engine, loras = engines["sd"], laws.loras_of(lora_files["sd"])
    request = asked(engine, "clora", *loras, options={"reference": True, "refine": "", "until": 0.3})
    (early, moved), (late, start) = rows_of(engine, request, ((0, 1.0), (3, 1.0)))
    assert early.isfinite().all() and not torch.equal(moved, start)
    laws.same(late[0], bare(engine, request, 3, start)[0])


def test_what_a_method_may_ask_for(case):
    """One row, layers that are combined, passes with a cache: each with the same negative row, which is computed once."""
    engine, loras = case
    with laws.opened(engine, asked(engine, "merge", *loras)) as (run, times, start):
        step = Step(0, len(times), times[0], start)
        both = run.denoise(step)
        laws.same(run.denoise(step, rows="positive"), both[1:])
        laws.same(run.denoise(step, combine=lambda path, at, base, each: base + each.sum(0)), both)
        laws.same(run.denoise(step, cond=run.encode().positive()), both[1:])
        counted = run.notes["evaluations"]
        assert counted == 0.5 + 4 * 0.5  # the base once, four positive rows
        passes = run.denoise_passes(step, run.passes(step))
        assert passes.shape[:2] == (len(loras), 2) and all(torch.equal(part[0], both[0]) for part in passes)
        laws.same(run.denoise_passes(step, run.passes(step), "positive"), passes[:, 1:])
        assert run.notes["evaluations"] - counted == 2 * len(loras) * 0.5
        later = step._replace(latents=start * 0.5)
        laws.differ(run.denoise(later)[0], both[0])
        run.adapters.use({})
        laws.same(run.denoise(step._replace(stage=1)), both)


# with conditions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlled(tmp_path_factory, engines):
    """Of each family an engine with something that reads a picture, and that picture."""
    folder = tmp_path_factory.mktemp("controlled")
    toys.write_controlnet(toys.controlnet(engines["sd"].backbone.pipeline, 1), folder / "sd/edges.safetensors")
    (folder / "flux").mkdir()
    toys.condition(engines["flux"].backbone.denoiser, folder / "flux/edges.safetensors", scale=0.3, kind="spatial", size=16)
    Image.effect_noise((laws.SIDE, laws.SIDE), 90).convert("RGB").save(folder / "edges.png")
    condition = Condition("edges", str(folder / "edges.png"), annotator="", strength=0.8)
    return {family: (Engine(engines[family].backbone, "toy", folders=[folder / family]), condition) for family in SHAPED}


@contextmanager
def read(engine, request):
    """A run of this request with its conditions read by the bare base, and its first step."""
    with laws.opened(engine, request) as (run, times, start):
        paths = {name: engine.find_condition(each.source) for name, each in run.request.controls.items()}
        run.conditions = engine._controls.opened(run.request, paths, (laws.SIDE, laws.SIDE), isolated=True, shelf={})
        run.read_conditions()
        yield run, Step(0, len(times), times[0], start)


@pytest.mark.parametrize("family", SHAPED)
def test_conditions_act_on_both_rows(family, controlled, lora_files):
    engine, condition = controlled[family]
    request = asked(engine, "merge", *laws.loras_of(lora_files[family]), conditions=[condition])
    with read(engine, request) as (run, step):
        rows, passes = run.denoise(step), run.denoise_passes(step, run.passes(step))
    with read(engine, replace(request, anchored=False)) as (run, step):
        laws.same(rows[1], run.denoise(step)[1])
        laws.same(passes[:, 1], run.denoise_passes(step, run.passes(step))[:, 1])
    with read(engine, replace(request, loras=(), anchored=False)) as (run, step):
        laws.same(rows[0], run.denoise(step)[0])
        laws.same(passes[:, 0], rows[:1].expand_as(passes[:, 0]))
    with read(engine, replace(request, conditions=())) as (run, step):
        laws.differ(rows[0], run.denoise(step)[0])
    assert laws.latents(engine, request).isfinite().all()


# what it costs, and what it leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, cost, sampler", [
    ("merge", 1, "heun"), ("switch", 1, "ddim"), ("composite", 2, "heun"), ("w-composite", 2, "ddim"), ("cmlora", 2, "ddim"), ("regions", 1, "ddim")])
def test_what_is_computed_is_counted(method, cost, sampler, engines, lora_files):
    """K LoRAs one by one are K + 1 rows in place of 2 K, whether in one batch or not: counted at the denoiser itself."""
    engine, loras, rows = engines["sd"], laws.loras_of(lora_files["sd"]), []
    request = asked(engine, method, *loras, sampler=sampler, options={"cache": False} if method == "cmlora" else {})
    evaluations = laws.STEPS if sampler == "ddim" else 2 * laws.STEPS - 1
    hook = engine.backbone.denoiser.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    try:
        for batched in (True, False):
            rows.clear()
            notes = engine.run(replace(request, batched=batched)).notes
            assert notes["evaluations"] == cost * evaluations == sum(rows) / 2
    finally:
        hook.remove()


def test_a_cached_pass_counts_for_its_row_alone(case):
    engine, loras = case
    request = asked(engine, "cmlora", *loras, steps=8)
    evaluations = engine.run(request).notes["evaluations"]
    plain = engine.run(replace(request, anchored=False)).notes["evaluations"]
    assert evaluations == pytest.approx(plain / 2 + request.steps / 2)


LAWS = (laws.seeds, laws.batch, laws.loop_or_batch, laws.returned, laws.no_leak, laws.weight_zero, laws.off_at_a_step)


@pytest.mark.parametrize(("method", "law"), [
    *(("merge", law) for law in LAWS), *(("cmlora", law) for law in (laws.batch, laws.loop_or_batch, laws.returned, laws.weight_zero)),
    ("composite", laws.no_leak), ("composite", laws.one_is_merge), ("clora-fast", laws.batch), ("clora-fast", laws.returned),
    ("clora-fast", laws.off_at_a_step), ("switch", laws.one_set_a_step)])
def test_laws(method, law, engines, lora_files, monkeypatch):
    """Of an anchored request; on FLUX what needs no cache or no map of attention, on Stable Diffusion the rest."""
    family, honest = "flux" if method in ("merge", "composite") else "sd", laws.request
    monkeypatch.setattr(laws, "request", lambda *args, **changes: honest(*args, **({"anchored": True} | changes)))
    law(engines[family], method, laws.loras_of(lora_files[family]))


def test_it_is_not_folded(engines, lora_files, monkeypatch):
    """A fold would be in both rows."""
    engine, (lora, *_) = engines["sd"], laws.loras_of(lora_files["sd"])
    folds, honest = [], Adapters.folded
    monkeypatch.setattr(Adapters, "folded", lambda self, *rest: (folds.append(rest), honest(self, *rest))[1])
    engine.run(asked(engine, "merge", lora))
    assert not folds
    engine.run(asked(engine, "merge", lora, anchored=False))
    engine.run(asked(engine, "merge", lora, guidance=1.0))  # no negative row: nothing is anchored
    assert len(folds) == 2


def test_without_a_lora_or_guidance_nothing_changes(case):
    engine, (lora, *_) = case
    for request in (asked(engine, "merge", replace(lora, weight=0.0)), asked(engine, "composite"), asked(engine, "composite", lora, guidance=1.0)):
        assert torch.equal(laws.latents(engine, request), laws.latents(engine, replace(request, anchored=False)))


def test_where_there_is_no_negative_row_it_is_noted(engines, lora_files):
    """Guidance off, and guidance that the model has inside; not where a true one is beside it, which is anchored then."""
    request = laws.request("merge", *laws.loras_of(lora_files["sd"]), anchored=True, guidance=1.0)
    assert engines["sd"].run(request).notes["not anchored"] == "guidance is off"
    assert "not anchored" not in engines["sd"].run(replace(request, guidance=2.0)).notes
    engine, loras = engines["flux-dev"], laws.loras_of(lora_files["flux-dev"])
    request = laws.request("composite", *loras, anchored=True)
    notes = engine.run(request).notes
    assert "true_guidance" in notes["not anchored"] and notes["evaluations"] == len(loras) * laws.STEPS
    assert torch.equal(laws.latents(engine, request), laws.latents(engine, replace(request, anchored=False)))
    true = replace(request, true_guidance=3.0)
    notes = engine.run(true).notes
    assert "not anchored" not in notes and notes["evaluations"] == (len(loras) + 1) / 2 * laws.STEPS
    laws.differ(laws.latents(engine, true), laws.latents(engine, replace(true, anchored=False)))


# mutants -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["LoRAs stay on", "of the first step for ever", "the prompt in its place"])
def test_mutant_anchor(broken, engines, lora_files, monkeypatch):
    honest, kept = Run._base, []

    def base(self, step):
        if broken == "LoRAs stay on":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.adapters, "use", lambda weights: Adapters.use(self.adapters, self.live(step)))
                return honest(self, step)
        if broken == "of the first step for ever":
            kept.append(honest(self, step))
            return kept[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("composition.loop.Conditioning.negative", lambda cond: cond.positive())
            return honest(self, step)

    monkeypatch.setattr(Run, "_base", base)
    with pytest.raises(AssertionError):
        test_every_method("merge", (engines["sd"], laws.loras_of(lora_files["sd"])))


@pytest.mark.parametrize("family", ["flux"])
def test_mutant_a_conditions_bank_of_the_other_row(family, controlled, lora_files, monkeypatch):
    honest = Run._evaluate
    monkeypatch.setattr(Run, "_evaluate", lambda self, *args, **more: honest(self, *args, **(more | {"negative": False})))
    with pytest.raises(AssertionError):
        test_conditions_act_on_both_rows(family, controlled, lora_files)
