"""Samplers by name: a fresh diffusers scheduler for every run, with the model's own noise schedule.

A scheduler holds the state of one run (its step, its past predictions), so none is ever shared: `make` builds a new
one from the configuration of the one the model was saved with, as `Class.from_config` does.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from composition.refusal import Refused
from composition.sampler_names import BY_TITLE, FLOW, TITLES, canonical


@dataclass(frozen=True)
class Sampler:
    """kind: the diffusers class, None for the model's own. title: the name A1111 and its kin write into pictures.

    settings: what this name fixes in the scheduler's configuration. noisy: it draws noise at every step, so pictures
    of a batch need a generator each. evaluations: denoiser calls per step. most: the most steps it can do.
    predictions: the kinds of prediction its class understands.
    """

    kind: Any
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    noisy: bool = False
    evaluations: int = 1
    most: int = 1000
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")


_FLOW = ("epsilon", "v_prediction", "sample", "flow_prediction")
_NO_SAMPLE = ("epsilon", "v_prediction")
_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_2M_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
_KARRAS = {"use_karras_sigmas": True}

# From diffusers' schedulers.
NAMES: Mapping[str, Sampler] = {
    "default": Sampler(None, TITLES["default"]),
    "euler": Sampler(EulerDiscreteScheduler, TITLES["euler"]),
    "euler-karras": Sampler(EulerDiscreteScheduler, TITLES["euler-karras"], _KARRAS),
    "euler-a": Sampler(EulerAncestralDiscreteScheduler, TITLES["euler-a"], noisy=True, predictions=_NO_SAMPLE),
    "heun": Sampler(HeunDiscreteScheduler, TITLES["heun"], evaluations=2),
    "dpm2": Sampler(KDPM2DiscreteScheduler, TITLES["dpm2"], evaluations=2, predictions=_NO_SAMPLE),
    "dpm2-a": Sampler(KDPM2AncestralDiscreteScheduler, TITLES["dpm2-a"], noisy=True, evaluations=2, predictions=_NO_SAMPLE),
    "dpm++2m": Sampler(DPMSolverMultistepScheduler, TITLES["dpm++2m"], _2M, predictions=_FLOW),
    "dpm++2m-karras": Sampler(DPMSolverMultistepScheduler, TITLES["dpm++2m-karras"], {**_2M, **_KARRAS}, predictions=_FLOW),
    "dpm++2m-sde": Sampler(DPMSolverMultistepScheduler, TITLES["dpm++2m-sde"], _2M_SDE, noisy=True, predictions=_FLOW),
    "dpm++2m-sde-karras": Sampler(
        DPMSolverMultistepScheduler, TITLES["dpm++2m-sde-karras"], {**_2M_SDE, **_KARRAS}, noisy=True, predictions=_FLOW
    ),
    "ddim": Sampler(DDIMScheduler, TITLES["ddim"]),
    "unipc": Sampler(UniPCMultistepScheduler, TITLES["unipc"], predictions=_FLOW),
    "deis": Sampler(DEISMultistepScheduler, TITLES["deis"], predictions=_FLOW),
    "pndm": Sampler(PNDMScheduler, TITLES["pndm"], {"skip_prk_steps": True}, predictions=_NO_SAMPLE),
    "lcm": Sampler(LCMScheduler, TITLES["lcm"], noisy=True, most=50),
}

# A name means one thing, whatever the model's own scheduler was set to; what the model's noise is stays the model's.
_PLAIN = {name: False for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")}
# Latents are not pixels: a class whose default is to clip them must not, unless the model says so.
_LATENT = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False}
# What changes the picture wholesale when a class cannot take it over, and the value that asks for nothing.
_NEEDED = {"rescale_betas_zero_snr": False, "trained_betas": None}


def make(name: str, scheduler: Any, steps: int | None = None) -> Any:
    """A new scheduler of that name for a model saved with `scheduler`: its betas, prediction type and spacing.

    Raises Refused for an unknown name, for more steps than the sampler can do, and when the sampler cannot do what
    the model was trained for.
    """
    sampler = named(name)
    config = dict(scheduler.config)
    if sampler.kind is None:
        return type(scheduler).from_config(config)
    if steps is not None and steps > sampler.most:
        raise Refused(f"sampler {name!r} does at most {sampler.most} steps, {steps} were asked for")
    prediction = config.get("prediction_type")
    if type(scheduler).__name__.startswith("FlowMatch"):
        if canonical(name) == "euler":
            return FlowMatchEulerDiscreteScheduler.from_config(config)
        raise Refused(f"sampler {name!r} cannot run this model, which follows a flow from noise to picture: use default or euler")
    if prediction not in sampler.predictions:
        others = [other for other, entry in NAMES.items() if prediction in entry.predictions and entry.kind]
        raise Refused(f"sampler {name!r} cannot run this model (it predicts {prediction or 'a flow of its own kind'}): "
                      f"use {' or '.join(['default', *others])}")
    known = inspect.signature(sampler.kind.__init__).parameters
    for key, nothing in _NEEDED.items():
        if config.get(key, nothing) != nothing and key not in known:
            raise Refused(f"sampler {name!r} cannot keep this model's noise schedule ({key}): use default or euler")
    settings = {**{key: value for key, value in _LATENT.items() if key not in config}, **_PLAIN, **sampler.settings}
    return sampler.kind.from_config(config, **{key: value for key, value in settings.items() if key in known})


def stages(scheduler: Any, count: int | None = None) -> list[tuple[int, int]]:
    """(step, stage) of each of the scheduler's times, once they are set: a step of a method of higher order takes several.
    count: of its last so many times alone, where the first are left out.

    Heun's method and DPM2 take two evaluations a step and one in the last. PNDM's first step takes two, and its first three take four
    each where it starts with Runge-Kutta steps. Of all other classes of diffusers every evaluation is a step.
    """
    count = len(scheduler.timesteps) if count is None else count
    if isinstance(scheduler, PNDMScheduler):
        runge_kutta = 0 if scheduler.prk_timesteps is None else len(scheduler.prk_timesteps)
        if runge_kutta:
            first = runge_kutta // 4
            return [divmod(index, 4) if index < runge_kutta else (first + index - runge_kutta, 0) for index in range(count)]
        return [(max(index - 1, 0), int(index == 1)) for index in range(count)]
    return [divmod(index, scheduler.order) for index in range(count)]


def named(name: str) -> Sampler:
    """The sampler of that name or title. Raises Refused with the nearest names for an unknown one."""
    if canonical(name) in NAMES:
        return NAMES[canonical(name)]
    near = get_close_matches(name.lower(), [*NAMES, *BY_TITLE], n=3, cutoff=0.5)
    guesses = list(dict.fromkeys(BY_TITLE.get(guess, guess) for guess in near))
    hint = f"did you mean {' or '.join(guesses)}? " if guesses else ""
    raise Refused(f"there is no sampler {name!r}: {hint}Samplers are {', '.join(NAMES)}")


def title(name: str, scheduler: Any) -> str:
    """What A1111 calls it, for the text in a picture; for "default" what the model's own scheduler amounts to."""
    sampler = named(name)
    if type(scheduler).__name__.startswith("FlowMatchEuler"):
        return FLOW
    if sampler.title:
        return sampler.title
    same = [entry for entry in NAMES.values() if entry.kind is type(scheduler)]
    for entry in same:
        settings = {**_PLAIN, **entry.settings}
        if all(scheduler.config.get(key, value) == value for key, value in settings.items()):
            return entry.title
    return same[0].title if same else type(scheduler).__name__.removesuffix("Scheduler")
