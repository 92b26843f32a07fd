"""CMLoRA and its cache, on toys of both families in float64: the eight laws of its specification."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import composition
from composition import Lora
from composition.backbones.unet import UNetBackbone
from composition.hooks.cache import of
from composition.hooks.cache.unet import FeatureCache, live_levels
from composition.hooks.costs import layer_costs
from composition.loop import Step
from composition.methods import cmlora
from tests.composition import laws
from tests.composition.conftest import SHAPED


@pytest.fixture(params=["sd", "sdxl", "sd3", "flux"])
def case(request, engines, lora_files):
    """An engine and three LoRAs, the last a place."""
    if request.param not in SHAPED:
        request.getfixturevalue("shapes_unchecked")
    return _case(request.param, engines, lora_files)


@pytest.fixture(params=SHAPED)
def course(request, engines, lora_files, shapes_unchecked):
    """The same on one UNet and one transformer: for what follows from the number of the step, whatever the denoiser."""
    return _case(request.param, engines, lora_files)


def _case(family, engines, lora_files):
    kinds = ("character", "style", "place")
    return engines[family], [replace(lora, category=kind) for lora, kind in zip(laws.loras_of(lora_files[family]), kinds, strict=True)]


def asked(loras, steps=20, **options):
    return laws.request("cmlora", *loras, steps=steps, options=options, sampler="euler")


def notes(engine, request):
    return engine.run(request).notes["cmlora"]


# 1: one LoRA is Merge: tests/composition/test_laws.py


def test_2_without_dominance_and_cache_it_is_composite(case):
    engine, loras = case
    plain = laws.latents(engine, replace(asked(loras, steps=6), method="composite", options={}))
    laws.same(laws.latents(engine, asked(loras, steps=6, dominance=False, cache=False)), plain)
    laws.differ(laws.latents(engine, asked(loras, steps=6, cache=False)), plain)


def test_2_refreshed_at_every_step_the_cache_changes_nothing(case):
    """And what may be older is further off."""
    engine, loras = case
    exact = laws.latents(engine, asked(loras, steps=12, cache=False))
    laws.same(laws.latents(engine, asked(loras, steps=12, max_age=0)), exact)
    near, far = (laws.apart(laws.latents(engine, asked(loras, steps=12, max_age=age)), exact) for age in (1, 1000))
    assert 0 < near < far


def _denoise(engine, loras, body):
    """Calls body(run, step) inside a session of these LoRAs."""
    from composition.backbones import schedulers
    from composition.run import Run

    request = asked(loras)
    found = [(name, lora, engine.find(lora.source)) for name, lora in zip(request.names, request.loras, strict=True)]
    scheduler = schedulers.make(request.sampler, engine.backbone.scheduler, request.steps)
    with engine.adapters.session(found), torch.no_grad():
        run = Run(engine.backbone, engine.adapters, request, scheduler, [torch.Generator().manual_seed(3)])
        latents, times = engine.backbone.start(request, scheduler, run.generators)
        return body(run, Step(0, request.steps, times[0], latents), times)


@pytest.mark.parametrize("batched", [True, False])
def test_4_a_cached_pass_at_age_0_is_the_full_pass(case, batched):
    engine, loras = case

    def body(run, step, times):
        run.request = replace(run.request, batched=batched)
        cache, names = of(run.backbone.denoiser), run.names
        with cache.attached():
            passes = run.passes(step)
            whole = run.denoise_passes(step, passes, cache=cache, full=names)
            for full in (set(), {names[1]}, {names[0], names[2]}):
                laws.same(run.denoise_passes(step, passes, cache=cache, full=full), whole, 1e-12)
            plain = run.denoise_passes(step, passes)
        laws.same(whole, plain, 1e-12)

    _denoise(engine, loras, body)


def test_4_an_old_slot_is_not_the_full_pass_and_stays_as_it_is(case):
    engine, loras = case

    def body(run, step, times):
        cache, names = of(run.backbone.denoiser), run.names
        later = step._replace(t=times[-1], latents=step.latents * 0.5)
        with cache.attached():
            passes = run.passes(step)
            run.denoise_passes(step, passes, cache=cache, full=names)
            before = {name: cache._slots[name].clone() for name in names}
            aged = run.denoise_passes(later, passes, cache=cache, full={names[0]})
            whole = run.denoise_passes(later, passes)
            laws.same(aged[0], whole[0], 1e-12)  # the one in full
            laws.differ(aged[1], whole[1])
            assert torch.equal(cache._slots[names[1]], before[names[1]]) and not torch.equal(cache._slots[names[0]], before[names[0]])

    _denoise(engine, loras, body)


def test_4_the_lora_stays_live_in_the_layers_that_run(case):
    """From the same slot, another weight gives another answer."""
    engine, loras = case

    def body(run, step, times):
        cache, name = of(run.backbone.denoiser), run.names[2]  # has attention and convolutions
        with cache.attached():
            run.denoise_passes(step, run.passes(step), cache=cache, full=run.names)
            answers = []
            for weight in (0.0, 1.0, 2.0):
                run.adapters.use({name: weight})
                with cache.cached([name]):
                    answers.append(run.backbone.denoise(step.latents, step.t, run.encode()))
        laws.differ(answers[0], answers[1])
        laws.differ(answers[1], answers[2])

    _denoise(engine, loras, body)


def test_5_equal_adapters_are_one(case):
    engine, loras = case
    one = laws.latents(engine, asked(loras[:1], steps=6))
    laws.same(laws.latents(engine, asked([loras[0]] * 3, steps=6, cache=False)), one)


def test_in_full_company_every_pass_is_merge(case):
    engine, loras = case
    merged = laws.latents(engine, replace(asked(loras, steps=6), method="merge", options={}))
    for options in ({"cache": False}, {"max_age": 0}, {"cache": False, "dominance": False}):
        laws.same(laws.latents(engine, asked(loras, steps=6, others_weight=1.0, **options)), merged)
    laws.differ(laws.latents(engine, asked(loras, steps=6, others_weight=0.5, cache=False)), merged)


def test_in_company_the_others_are_on_at_that_share(case):
    """Against one evaluation after the other with the weights written out."""
    engine, loras = case

    def body(run, step, times):
        passes = run.passes(step, others_weight=0.25)
        each = run.denoise_passes(step, passes)
        cache = of(run.backbone.denoiser)
        with cache.attached():
            laws.same(run.denoise_passes(step, passes, cache=cache, full=run.names), each, 1e-12)
            laws.same(run.denoise_passes(step, passes, cache=cache, full=run.names[:1]), each, 1e-12)
        for k, name in enumerate(run.names):
            laws.same(each[k], run.denoise(step, {other: w * (1.0 if other == name else 0.25) for other, w in run.live(step).items()}))

    _denoise(engine, loras, body)


def test_on_a_processor_large_pictures_are_asked_one_by_one(case, monkeypatch):
    """And the answers are the same."""
    from composition import run as module

    engine, loras = case

    def body(run, step, times):
        calls = []
        handle = run.backbone.denoiser.register_forward_hook(lambda *_: calls.append(1))
        try:
            together = run.denoise_passes(step, run.passes(step))
            assert len(calls) == 1
            monkeypatch.setattr(module, "PROCESSOR_BATCH", 1)
            laws.same(run.denoise_passes(step, run.passes(step)), together)
            assert len(calls) == 1 + len(run.names)
        finally:
            handle.remove()

    _denoise(engine, loras, body)


def test_6_evaluations_are_those_of_the_slots_that_were_filled(case):
    engine, loras = case
    result = engine.run(asked(loras))
    told = result.notes["cmlora"]
    cache = of(engine.backbone.denoiser)
    share = cache.share(engine.backbone.axis, (laws.SIDE // 2, laws.SIDE // 2), engine.backbone.encode(["a"], [""]).values["text"].shape[2])
    full = sum(len(names) for names in told["full"])
    assert result.notes["evaluations"] == pytest.approx(full + share * (20 * 3 - full))
    assert 0.05 < share < 0.95


def test_7_and_8_the_late_phase_comes_and_refreshes_whatever_the_number_of_steps(course):
    engine, loras = course
    for steps in (20, 30):
        told = notes(engine, asked(loras, steps=steps))
        late = [index for index, phase in enumerate(told["phase"]) if phase == "late"]
        assert late == list(range(-(-steps * 6 // 10), steps))
        assert sorted(told["full"][late[0]]) == sorted(engine_names(told))  # every slot, at the change
        assert sum(len(full) for full in told["full"][late[0] + 1 :]) >= len(late) - 1  # the leader in every later step too
        assert told["low"][0] in told["leaders"][late[0] :] and told["low"][0] not in told["leaders"][: late[0]]
        assert max(max(ages) for ages in told["ages"]) <= 6


def engine_names(told):
    return [*told["high"], *told["low"]]


def test_reference_does_what_the_released_code_does(course, monkeypatch):
    """The phase at step 120 only (here 12), constant weights, nothing refreshed after it."""
    engine, loras = course
    assert cmlora.REFERENCE_BOUNDARY == 120
    monkeypatch.setattr(cmlora, "REFERENCE_BOUNDARY", 12)
    told = notes(engine, asked(loras, steps=16, reference=True))
    assert told["phase"] == ["early"] * 13 + ["late"] * 3
    assert set(told["weight"]) == {1.6667}
    assert not any(told["full"][13:]) and told["full"][0] == [*asked(loras).names]
    assert all(len(full) <= 1 for full in told["full"][1:])
    assert "late" not in notes(engine, asked(loras, steps=5, reference=True))["phase"]


def test_online_ends_the_early_phase_by_the_latents_own_frequency(course):
    engine, loras = course
    told = notes(engine, asked(loras, online=True, threshold=1.0))  # every latent is under it: calm after three steps
    assert told["phase"] == ["early"] * 2 + ["late"] * 18
    assert set(notes(engine, asked(loras, online=True, threshold=0.0))["phase"]) == {"early"}
    assert len(told["H"]) == 20 and all(0 <= h <= 1 for h in told["H"])


def test_a_lora_that_comes_and_goes(course):
    """start and end: the lead is among those that are on; with none on the base goes on alone."""
    engine, loras = course
    part = [replace(loras[0], end=0.5), replace(loras[1], start=0.25, end=0.75)]
    told = notes(engine, asked(part))
    first, second = engine_names(told)
    assert set(told["leaders"][:5]) == {first} and set(told["leaders"][10:15]) == {second} and len(told["leaders"]) == 15


def test_pinned_order(course):
    engine, loras = course
    names = asked(loras).names
    told = notes(engine, asked(loras, steps=2, order=f"{names[2]},{names[1]}", low=names[0]))
    assert told["high"] == [names[2], names[1]] and told["low"] == [names[0]] and told["leaders"][0] == names[2]


def test_the_timeline_is_readable(course):
    engine, loras = course
    lines = cmlora.timeline(engine.run(asked(loras)).notes)
    assert lines[0].split() == ["phase", "e" * 12 + "l" * 8]
    for line in lines[1:]:
        name, letters = line.split()
        assert name in asked(loras).names and len(letters) == 20 and set(letters) <= set("#+.")
    assert all(sum(line.split()[1][step] == "#" for line in lines[1:]) == 1 for step in range(20))


# the cache point -----------------------------------------------------------------------------------------------------


def _unet(blocks, **more):
    """A small UNet of these kinds of levels, outermost first."""
    down = tuple("CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in blocks)
    up = tuple("CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in blocks[::-1])
    return UNet2DConditionModel(sample_size=16, block_out_channels=(8,) * len(blocks), layers_per_block=1, norm_num_groups=4,
                                down_block_types=down, up_block_types=up, cross_attention_dim=8, attention_head_dim=2, **more)


@pytest.mark.parametrize("blocks, live", [
    ((True, True, True, False), 1), ((False, True, True), 2), ((False, True), 1), ((True,), 1), ((False, False, True, True), 3),
], ids=["sd", "sdxl", "pocket", "one level", "deep"])  # fmt: skip
def test_the_cache_keeps_attention_in_play_where_it_can(blocks, live):
    assert live_levels(_unet(blocks)) == live
    assert FeatureCache(_unet(blocks)).usable == (len(blocks) > 1)


@pytest.mark.parametrize("size", [(16, 16), (20, 12), (18, 10)])
@pytest.mark.parametrize("blocks", [(True, True, True, False), (False, True, True), (False, True)])
def test_every_depth_and_size_gives_the_full_pass_at_age_0(blocks, size):
    torch.manual_seed(0)
    unet = _unet(blocks).double().eval()
    latents, text = torch.randn(2, 4, *size).double(), torch.randn(2, 5, 8).double()
    cache = FeatureCache(unet)
    with torch.no_grad(), cache.attached():
        with cache.full(["a"]):
            whole = unet(latents, 10, text)[0]
        with cache.cached(["a"]):
            again = unet(latents, 10, text)[0]
        with cache.cached(["a"]):
            moved = unet(latents + 1, 10, text)[0]
    assert torch.equal(again, whole) and not torch.equal(moved, whole)
    assert not any("forward" in module.__dict__ for module in unet.modules())
    with torch.no_grad():
        assert torch.equal(unet(latents, 10, text)[0], whole)


def test_what_is_skipped_is_not_run_and_what_is_counted_is():
    """The layers that ran in a cached pass are those that the count takes for live; their multiply-adds as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    unet = _unet((True, True, True, False)).eval()
    axis = UNetBackbone(type("Pipe", (), {"unet": unet, "scheduler": None, "_execution_device": "cpu"})(), "sd").axis
    cache, ran = FeatureCache(unet), set()
    for path, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(lambda *_, path=path: ran.add(path))
    call = lambda: unet(torch.randn(1, 4, 16, 16), 10, torch.randn(1, 5, 8))  # noqa: E731
    with torch.no_grad(), cache.attached():
        counted = {}
        for name, opened in (("full", cache.full), ("cached", cache.cached)):
            ran.clear()
            with opened(["a"]), FlopCounterMode(display=False) as counter:
                call()
            counted[name] = sum(n for op, n in counter.get_flop_counts()["Global"].items()
                                if "attention" not in str(op) and "bmm" not in str(op)) // 2
            assert ran == {path for path in layer_costs(unet, axis, (16, 16), 5) if name == "full" or not cache.skips(path)}
    costs = layer_costs(unet, axis, (16, 16), 5)
    assert counted["full"] == sum(costs.values())
    assert counted["cached"] == sum(cost for path, cost in costs.items() if not cache.skips(path))
    assert cache.share(axis, (16, 16), 5) == pytest.approx(counted["cached"] / counted["full"])


@pytest.mark.parametrize("family, size, live, full, cached", [
    ("sd15", (64, 64), 1, 338.6, 98.0), ("sd15", (128, 96), 1, 1012.8, 293.7), ("sdxl", (128, 128), 2, 2988.7, 816.5),
])  # fmt: skip
def test_the_true_sizes_cost_what_the_table_says(family, size, live, full, cached):
    """Giga multiply-adds of one row, attention products left out; DeepCache's own count of SD1.5 is 338.8."""
    config = json.loads((Path(composition.__file__).parent / f"backbones/loading/configs/{family}/unet/config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    axis = UNetBackbone(type("Pipe", (), {"unet": unet, "scheduler": None})(), "sd").axis
    cache, costs = FeatureCache(unet), layer_costs(unet, axis, size, 77)
    assert cache.live == live
    assert sum(costs.values()) / 1e9 == pytest.approx(full, abs=0.1)
    assert sum(cost for path, cost in costs.items() if not cache.skips(path)) / 1e9 == pytest.approx(cached, abs=0.1)


@pytest.mark.parametrize("count, bar", [(2, 1.45), (3, 1.75), (4, 2.1), (5, 2.5)])
def test_a_run_costs_few_passes_whatever_the_number_of_loras(count, bar):
    """Counted over the schedule the method itself made, 50 steps; without forced refreshes it is the paper's table."""
    from tests.bench.cmlora import cost, schedule

    assert 1 + (count - 1) * 0.289 < cost(schedule(count, 50), count, 0.2895) < bar
    leader_alone = cost(schedule(count, 200, max_age=1000, low="none"), count, 0.2895)
    assert leader_alone == pytest.approx({2: 1.29, 3: 1.59, 4: 1.88, 5: 2.17}[count], abs=0.02)


def test_forward_that_was_there_before_is_there_after():
    """accelerate's offloading puts its own forward on blocks."""
    unet = _unet((True, True, False))
    mid = unet.mid_block
    own = mid.forward
    mid.forward = mine = lambda *args, **named: own(*args, **named)
    cache = FeatureCache(unet)
    with pytest.raises(OSError), cache.attached():
        raise OSError
    assert mid.__dict__["forward"] is mine and not cache.has("a")


def test_a_cache_that_saw_no_pass_says_so():
    cache = FeatureCache(_unet((True, True)))
    with cache.attached(), pytest.raises(RuntimeError, match="saw no pass"), cache.full(["a"]):
        pass


def test_on_pocket():
    """The shipped model: the cached pass runs with its cache, in the order by category."""
    from composition import Engine

    with Engine.open("pocket", device="cpu") as engine:
        request = asked([Lora("raccoon"), Lora("moon"), Lora("ink")], steps=10, order="category")
        result = engine.run(replace(request, guidance=4.5, size=(64, 64)))
        told = result.notes["cmlora"]
        assert told["high"] == ["raccoon", "ink"] and told["low"] == ["moon"]
        assert told["leaders"][0] == "raccoon" and told["leaders"][-1] in ("ink", "moon")
        assert result.notes["evaluations"] < 30
