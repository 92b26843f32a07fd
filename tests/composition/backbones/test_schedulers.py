"""Samplers: a name is a fresh stock scheduler that keeps the model's noise schedule."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)

from composition.backbones import schedulers
from composition.refusal import Refused
from tests import toys

STEPS = 4


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def stock(pipe) -> torch.Tensor:
    return pipe("a fox and an owl", num_inference_steps=STEPS, guidance_scale=3.0, generator=seeded(),
                output_type="latent").images


def by_hand(pipe, scheduler) -> torch.Tensor:
    """The loop of a plain SD pipeline, written out."""
    positive, negative = pipe.encode_prompt("a fox and an owl", "cpu", 1, True)
    generator = seeded()
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 16, 16, generator=generator) * scheduler.init_noise_sigma
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    for t in scheduler.timesteps:
        rows = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        with torch.no_grad():
            answer = pipe.unet(rows, t, encoder_hidden_states=torch.cat([negative, positive])).sample
        without, given = answer.chunk(2)
        extra = {"generator": generator} if takes_generator else {}
        latents = scheduler.step(without + 3.0 * (given - without), t, latents, **extra).prev_sample
    return latents


@pytest.fixture(scope="module")
def pipe():
    return toys.sd()


@pytest.mark.parametrize("name", schedulers.NAMES)
def test_stock_pipeline_and_hand_made_loop_agree_bit_for_bit(pipe, name: str) -> None:
    own = pipe.scheduler
    try:
        pipe.scheduler = schedulers.make(name, own, STEPS)
        latents = stock(pipe)
    finally:
        pipe.scheduler = own
    assert torch.isfinite(latents).all()
    assert torch.equal(latents, by_hand(pipe, schedulers.make(name, own, STEPS)))


def test_names_mean_different_samplers(pipe) -> None:
    made = [by_hand(pipe, schedulers.make(name, pipe.scheduler)) for name in schedulers.NAMES if name != "default"]
    alike = [(a, b) for a in range(len(made)) for b in range(a) if torch.equal(made[a], made[b])]
    assert not alike


@pytest.mark.parametrize("name", schedulers.NAMES)
def test_every_call_is_a_new_instance_and_the_models_own_is_untouched(name: str) -> None:
    own = PNDMScheduler(**toys.BETAS, skip_prk_steps=True, steps_offset=1)
    before = dict(own.config)
    one, two = schedulers.make(name, own), schedulers.make(name, own)
    one.set_timesteps(5)
    assert one is not two and one is not own
    assert two.num_inference_steps != 5 and own.num_inference_steps != 5
    assert dict(own.config) == before


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", schedulers.NAMES)
def test_the_models_noise_schedule_carries_over_or_is_refused(name: str, prediction: str) -> None:
    own = DDIMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="linear", prediction_type=prediction,
                        timestep_spacing="trailing", steps_offset=1, clip_sample=False)
    if prediction not in schedulers.named(name).predictions:
        with pytest.raises(Refused, match="predicts sample: use|predicts sample\\)"):
            schedulers.make(name, own)
        return
    made = schedulers.make(name, own)
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing", "steps_offset"):
        assert made.config[key] == own.config[key], key
    assert torch.equal(made.alphas_cumprod, own.alphas_cumprod)
    made.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 4, 4, generator=seeded())
    for t in made.timesteps:
        latents = made.step(torch.zeros_like(latents), t, latents).prev_sample
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("name", schedulers.NAMES)
def test_evaluations_and_noise_are_as_declared(name: str) -> None:
    own, entry = EulerDiscreteScheduler(**toys.BETAS), schedulers.named(name)

    def end(seed: int) -> torch.Tensor:
        made = schedulers.make(name, own)
        made.set_timesteps(6)
        if name != "pndm":  # its first step takes two
            assert len(made.timesteps) == 6 * entry.evaluations - (entry.evaluations - 1)
        takes = "generator" in made.step.__code__.co_varnames
        generator, latents = torch.Generator().manual_seed(seed), torch.ones(1, 4, 4, 4)
        for t in made.timesteps:
            latents = made.step(latents * 0.1, t, latents, **({"generator": generator} if takes else {})).prev_sample
        return latents

    assert torch.equal(end(1), end(2)) is not entry.noisy


@pytest.mark.parametrize("kind, first", [
    (HeunDiscreteScheduler, lambda made: made.state_in_first_order), (KDPM2DiscreteScheduler, lambda made: made.state_in_first_order),
    (KDPM2AncestralDiscreteScheduler, lambda made: made.state_in_first_order),
    (FlowMatchHeunDiscreteScheduler, lambda made: made.state_in_first_order), (EulerDiscreteScheduler, lambda made: True),
    (DDIMScheduler, lambda made: True),
])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_step_is_what_a_method_of_higher_order_does_between_two_states(kind, first, steps) -> None:
    """Stage 0 where the scheduler itself says that a step begins; as many steps as were asked for."""
    made, latents = kind(), torch.ones(1, 4, 4, 4)
    made.set_timesteps(steps)
    found = []
    for t, (index, stage) in zip(made.timesteps, schedulers.stages(made), strict=True):
        assert (stage == 0) is first(made)
        found.append(index)
        latents = made.step(latents * 0.1, t, latents).prev_sample
    assert sorted(set(found)) == list(range(steps)) and found == sorted(found)


@pytest.mark.parametrize("skip, expected", [
    (True, [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (4, 0)]),
    (False, [*((step, stage) for step in range(3) for stage in range(4)), (3, 0), (4, 0)]),
])  # fmt: skip
def test_the_first_steps_of_pndm_take_several_evaluations(skip, expected) -> None:
    made = PNDMScheduler(**toys.BETAS, skip_prk_steps=skip)
    made.set_timesteps(5)
    assert schedulers.stages(made) == expected
    made.set_timesteps(6)
    assert len({index for index, _ in schedulers.stages(made)}) == 6


def test_latents_are_not_clipped_unless_the_model_says_so() -> None:
    own = PNDMScheduler(**toys.BETAS)  # says nothing of clipping; DDIM's and LCM's default is to clip
    assert schedulers.make("ddim", own).config["clip_sample"] is False
    assert schedulers.make("lcm", own).config["clip_sample"] is False
    assert schedulers.make("ddim", DDIMScheduler(clip_sample=True)).config["clip_sample"] is True


def test_a_name_means_one_thing_whatever_the_model_was_saved_with() -> None:
    own = diffusers.DPMSolverMultistepScheduler(**toys.BETAS, algorithm_type="sde-dpmsolver++", solver_order=3,
                                                use_karras_sigmas=True)
    made = schedulers.make("dpm++2m", own)
    assert (made.config["algorithm_type"], made.config["solver_order"]) == ("dpmsolver++", 2)
    assert made.config["use_karras_sigmas"] is False
    assert schedulers.make("dpm++2m-karras", own).config["use_karras_sigmas"] is True
    assert schedulers.make("default", own).config["solver_order"] == 3


def test_refusals_say_what_to_do() -> None:
    own = DDIMScheduler(**toys.BETAS)
    with pytest.raises(Refused, match="did you mean euler-a"):
        schedulers.make("euler_a", own)
    with pytest.raises(Refused, match="did you mean dpm\\+\\+2m-karras"):
        schedulers.make("DPM++ 2M Karas", own)
    with pytest.raises(Refused, match="Samplers are default, euler"):
        schedulers.make("zzzzzz", own)
    with pytest.raises(Refused, match="at most 50 steps"):
        schedulers.make("lcm", own, 51)
    with pytest.raises(Refused, match="use default or euler"):
        schedulers.make("ddim", FlowMatchEulerDiscreteScheduler())
    assert schedulers.make("euler", FlowMatchEulerDiscreteScheduler(shift=3.0)).config["shift"] == 3.0
    with pytest.raises(Refused, match="rescale_betas_zero_snr"):
        schedulers.make("heun", DDIMScheduler(**toys.BETAS, rescale_betas_zero_snr=True))
    assert schedulers.make("euler", DDIMScheduler(rescale_betas_zero_snr=True)).config["rescale_betas_zero_snr"]


def test_titles_are_those_of_a1111() -> None:
    own = EulerDiscreteScheduler(**toys.BETAS)
    assert schedulers.title("euler-a", own) == "Euler a"
    assert schedulers.title("dpm++2m-karras", own) == "DPM++ 2M Karras"
    assert schedulers.title("default", own) == "Euler"
    assert schedulers.title("default", PNDMScheduler()) == "PLMS"
    assert schedulers.title("default", schedulers.make("dpm++2m-sde", own)) == "DPM++ 2M SDE"
    assert schedulers.title("default", FlowMatchEulerDiscreteScheduler()) == "Euler Simple"
    assert len({entry.title for entry in schedulers.NAMES.values()}) == len(schedulers.NAMES)
