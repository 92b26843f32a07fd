"""ControlNets on toys in float64: stock pipelines' pictures, every method's laws, strength 0, caches, gradients."""

from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from PIL import Image

from composition.hooks import cache as caches
from composition.hooks import controlnet
from composition.hooks.controlnet import Control, controlled
from composition.hooks.regional import Segments
from composition.loop import Step
from composition.run import Pass
from tests import reference, toys
from tests.composition import laws
from tests.composition.conftest import FAMILIES

SIDE = laws.SIDE
PICTURES = [Image.effect_noise((SIDE, SIDE), 90).convert("RGB"), Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")]
PIPES = {"sd": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}


@pytest.fixture(autouse=True)
def quick(shapes_unchecked):
    """Shapes of what happens here are checked where each method is tested."""


@pytest.fixture(params=["sd", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def nets(engines):
    return {name: [toys.controlnet(engines[name].backbone.pipeline, seed) for seed in (1, 2)] for name in PIPES}


def controls(nets, strengths=(0.8, 0.5)):
    return [Control(net, controlnet.hint(picture, (SIDE, SIDE)), strength)
            for net, picture, strength in zip(nets, PICTURES, strengths, strict=False)]


@pytest.fixture
def case(family, engines, nets, lora_files):
    """An engine, its ControlNets, three LoRAs."""
    return engines[family], controls(nets[family]), laws.loras_of(lora_files[family])


@pytest.mark.parametrize(("count", "guidance"), [(1, 4.0), (2, 4.0), (2, 1.0)])
def test_merge_is_the_stock_pipeline(family, case, count, guidance, nets, lora_files):
    """With a LoRA, for two seeds, with one ControlNet and with two."""
    engine, given, loras = case
    asked = laws.request("merge", loras[0], guidance=guidance, sampler="euler", negative="the owl", count=2, steps=3)
    with controlled(engine.backbone.denoiser, given[:count]):
        mine = laws.latents(engine, asked)
    pipe = PIPES[family](**FAMILIES[family](dtype=torch.float64).components, controlnet=nets[family][:count])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(engine.backbone.scheduler.config)
    reference.load(pipe, lora_files[family][:1], [loras[0].weight])
    stock = [pipe(asked.prompt, image=PICTURES[:count], negative_prompt=asked.negative, width=SIDE, height=SIDE, guidance_scale=guidance,
                  num_inference_steps=asked.steps, generator=torch.Generator().manual_seed(seed), output_type="latent",
                  controlnet_conditioning_scale=[control.strength for control in given[:count]]).images for seed in asked.seeds]  # fmt: skip
    laws.same(mine, torch.cat(stock))
    laws.differ(mine, laws.latents(engine, asked))


def test_strength_0_is_nothing_bit_for_bit(case):
    engine, given, loras = case
    asked = laws.request("merge", loras[0], steps=2)
    plain = laws.latents(engine, asked)
    with controlled(engine.backbone.denoiser, [control._replace(strength=0.0) for control in given]):
        assert torch.equal(laws.latents(engine, asked), plain)
    first = given[:1]
    with controlled(engine.backbone.denoiser, first):
        alone = laws.latents(engine, asked)
    with controlled(engine.backbone.denoiser, [*first, given[1]._replace(strength=0.0)]):
        assert torch.equal(laws.latents(engine, asked), alone)


def test_order_does_not_matter(case):
    engine, given, loras = case
    asked = laws.request("merge", loras[0], steps=3)
    pictures = []
    for some in (given, given[::-1]):
        with controlled(engine.backbone.denoiser, some):
            pictures.append(laws.latents(engine, asked))
    laws.same(*pictures, tolerance=1e-12)


@pytest.mark.parametrize(("method", "family"), [("merge", "sdxl"), ("composite", "sdxl"), ("switch", "sd"), ("cmlora", "sd"),
                                                ("clora", "sd"), ("regions", "sd")])
def test_rows_of_every_kind(method, family, engines, nets, lora_files):
    """Rows at once or one by one, two pictures in one batch or by themselves: the same."""
    engine, loras = engines[family], laws.loras_of(lora_files[family])[:2]
    asked = laws.request(method, *loras, steps=2, count=2, sampler="euler")
    with controlled(engine.backbone.denoiser, controls(nets[family])[:1]):
        singles = laws.latents(engine, asked)
        laws.same(laws.latents(engine, replace(asked, batched=False)), singles)
        engine.together = 2
        try:
            laws.same(laws.latents(engine, asked), singles)
        finally:
            engine.together = 1


@pytest.mark.parametrize("everywhere", [0, 1])
def test_a_segment_that_is_everywhere_is_the_only_one(case, everywhere):
    """A ControlNet reads each segment of a regional prompt where the UNet reads it."""
    engine, given, loras = case
    with laws.opened(engine, laws.request("regions", *loras[:2])) as (run, times, start):
        step, shares = Step(0, len(times), times[0], start), torch.zeros(1, 2, SIDE // 2, SIDE // 2, dtype=torch.float64)
        shares[:, everywhere] = 1.0
        passes = [Pass({}, run.encode("the owl", {})), Pass({}, run.encode("a fox", {}))]
        conds = [item.cond for item in passes]
        segments = Segments(shares, conds[0].rows, (SIDE // 2, SIDE // 2), conds[0].values["text"].shape[2])
        one = passes[everywhere]
        with controlled(engine.backbone.denoiser, given):
            alone = run.denoise(step, one.use, one.cond)
            several = run.denoise_regional(step, passes, shares)
        with controlled(engine.backbone.denoiser, given, segments=segments):
            laws.same(run.denoise_regional(step, passes, shares), alone)
        assert laws.apart(several, alone) > 1e-5  # what a ControlNet would do that reads all segments as one prompt


def test_a_cached_pass_is_the_whole_one_at_age_0(case):
    engine, given, loras = case
    with controlled(engine.backbone.denoiser, given[:1]):
        laws.cached_is_full_at_age_0(engine, loras[:2])


def test_a_cached_pass_has_this_steps_residuals_outside_and_the_slots_within(case):
    """Its deep features stay, whatever the ControlNet says now; what it says now counts at the outer levels."""
    engine, given, loras = case
    unet = engine.backbone.denoiser
    with laws.opened(engine, laws.request("cmlora", *loras)) as (run, times, start):
        step, cache = Step(0, len(times), times[0], start), caches.of(unet)
        with cache.attached():
            passes = run.passes(step)
            with controlled(unet, given):
                whole = run.denoise_passes(step, passes, cache=cache, full=run.names)
                kept = dict(cache._slots)
            with controlled(unet, [control._replace(strength=3 * control.strength) for control in given]):
                louder = run.denoise_passes(step, passes, cache=cache, full=())
                assert all(cache._slots[name] is slot for name, slot in kept.items())
            laws.differ(louder, whole)
            with controlled(unet, [control._replace(net=Shallow(control.net, cache.live)) for control in given]):
                laws.same(run.denoise_passes(step, passes, cache=cache, full=()), whole, 1e-12)


class Shallow:
    """A ControlNet whose residuals below the outer levels are noise."""

    def __init__(self, net, live):
        self.net, self.outer = net, 1 + sum(len(block.resnets) + (level < live - 1) for level, block in enumerate(net.down_blocks[:live]))

    def __call__(self, *args, **named):
        down, mid = self.net(*args, **named)
        return [item if place < self.outer else torch.randn_like(item) for place, item in enumerate(down)], torch.randn_like(mid)


def test_the_gradient_by_the_latents_goes_through_the_controlnet(case):
    engine, given, _ = case
    unet, (net,) = engine.backbone.denoiser, [control.net for control in given[:1]]
    with laws.opened(engine, laws.request("merge")) as (run, times, start), torch.enable_grad():
        x = start.clone().requires_grad_()
        with controlled(unet, given[:1]):
            (mine,) = torch.autograd.grad(run.denoise(Step(0, len(times), times[0], x)).square().sum(), x)
        cond, y = run.encode(), run.scaled(Step(0, len(times), times[0], start)).clone().requires_grad_()
        scale = float((y.detach() / start).mean())
        rows, text = torch.cat([y, y]), cond.values["text"][:, 0]
        more = {} if "pooled" not in cond.values else {"added_cond_kwargs": {
            "text_embeds": cond.values["pooled"][:, 0], "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2, dtype=torch.float64)}}
        down, mid = net(rows, times[0], text, given[0].hint.double().expand(2, -1, -1, -1), 0.8, return_dict=False, **more)
        out = unet(rows, times[0], text, down_block_additional_residuals=down, mid_block_additional_residual=mid, **more).sample
        (by_hand,) = torch.autograd.grad(out.square().sum(), y)
    laws.same(mine, by_hand * scale)


def test_everything_is_as_before_and_an_interrupted_context_is_taken_off(case):
    engine, given, loras = case
    unet, before = engine.backbone.denoiser, laws.fingerprint(engine)
    with pytest.raises(ZeroDivisionError), controlled(unet, given):
        laws.latents(engine, laws.request("merge", loras[0], steps=1))
        raise ZeroDivisionError
    assert laws.fingerprint(engine) == before
    left = controlled(unet, given)
    left.__enter__()
    controlnet.abandon(unet)
    assert laws.fingerprint(engine) == before
    with pytest.raises(RuntimeError, match="without them"):
        left.__exit__(None, None, None)


def test_a_unet_that_runs_past_the_hook_is_noticed(case):
    engine, given, _ = case
    with pytest.raises(RuntimeError, match="ran without them"), controlled(engine.backbone.denoiser, given):
        pass


def test_mutant_that_gives_the_first_row_alone_is_caught(case, monkeypatch):
    honest = controlnet._Hook.residuals

    def first(self, *args):
        down, mid = honest(self, *args)
        mask = torch.zeros(len(mid), 1, 1, 1, dtype=mid.dtype)
        mask[0] = 1
        return [item * mask for item in down], mid * mask

    monkeypatch.setattr(controlnet._Hook, "residuals", first)
    engine, given, loras = case
    with pytest.raises(AssertionError), controlled(engine.backbone.denoiser, given):
        laws.loop_or_batch(engine, "composite", loras[:2])
