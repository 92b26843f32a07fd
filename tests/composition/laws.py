"""The laws every method obeys, as functions that raise AssertionError: the tests run them, the mutants must break them."""

import gc
import hashlib
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composition import Cancelled, Engine, Lora, Request, methods
from composition.backbones import schedulers
from composition.loop import Step
from composition.run import Run

STEPS, SIDE = 4, 16  # of a law's picture: 8 x 8 latents
FLOWS = ("sd3", "flux", "flux-dev")  # families that predict a flow: their one sampler is their own
WHOLE, NOWHERE = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1e-9, 1e-9)  # regions
# Options that make a method cheap enough to be asked often, and that give every LoRA a turn in so few steps.
LIGHT = {"clora": {"until": 0.5, "rounds": 0}, "switch": {"tau": 1}, "switch-a": {"tau": 1}, "w-switch": {"tau": 1}}
MERGED: dict[tuple[int, str], torch.Tensor] = {}  # Merge's final latents, by engine and request: several laws compare with them


def request(method, *loras, **changes):
    fields = {"prompt": "the fox and the owl on the moon", "negative": "", "loras": loras, "method": method, "options": LIGHT.get(method, {}),
              "steps": STEPS, "guidance": 4.0, "seed": 11, "size": (SIDE, SIDE)}
    return Request(**(fields | changes))


def latents(engine: Engine, asked: Request) -> torch.Tensor:
    """The final latents of a request, all its pictures in order."""
    last = {}
    engine.run(asked, on_step=lambda event: last.__setitem__(event.picture, event.latents.clone()))
    return torch.cat([last[picture] for picture in sorted(last)])


def merged(engine: Engine, *loras: Lora, **changes) -> torch.Tensor:
    """Merge's final latents, computed once for each engine."""
    asked = request("merge", *loras, **changes)
    key = id(engine), repr(asked)
    if key not in MERGED:
        MERGED[key] = latents(engine, asked)
    return MERGED[key]


@contextmanager
def opened(engine: Engine, asked: Request):
    """(run, times, latents) of this request inside a session of its LoRAs."""
    asked, _ = engine.settle(asked)
    loras = [(name, lora, engine.find(lora.source)) for name, lora in zip(asked.names, asked.loras, strict=True)]
    scheduler = schedulers.make(asked.sampler, engine.backbone.scheduler, asked.steps)
    with engine.adapters.session(loras), torch.no_grad():
        run = Run(engine.backbone, engine.adapters, asked, scheduler, [torch.Generator().manual_seed(seed) for seed in asked.seeds])
        start, times = engine.backbone.start(asked, scheduler, run.generators)
        yield run, times, start


def prediction(engine: Engine, asked: Request, index: int) -> torch.Tensor:
    """A method's guided prediction at one step of a sampler of the first order, from the noise, of a course that begins there."""
    method = methods.find(asked.method)
    with opened(engine, asked) as (run, times, start), method.compose(run, method.read(asked.options)) as predict:
        return predict(Step(index, len(times), times[index], start)).value


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def same(a, b, tolerance=1e-9):
    assert a.shape == b.shape and apart(a, b) < tolerance, f"apart by {apart(a, b):.3g}"


def differ(a, b):
    assert apart(a, b) > 1e-3, f"only {apart(a, b):.3g} apart"


# the laws ------------------------------------------------------------------------------------------------------------


def one_is_merge(engine, method, loras):
    """One LoRA: equals Merge."""
    same(latents(engine, request(method, loras[0])), merged(engine, loras[0]))


def none_is_plain(engine, method, loras):
    """No LoRA: every method is the base alone."""
    same(latents(engine, request(method)), merged(engine))


def twins(engine, method, loras):
    """Two equal LoRAs, asked one by one, equal one."""
    same(latents(engine, request(method, loras[0], loras[0])), latents(engine, request(method, loras[0])))


def order(engine, method, loras):
    """Symmetric methods ignore the order of the LoRAs; the others must not."""
    there, back = (latents(engine, request(method, *way)) for way in (loras, loras[::-1]))
    same(there, back) if methods.find(method).symmetric else differ(there, back)


def seeds(engine, method, loras):
    """The same request gives the same bytes; another seed another picture."""
    asked = request(method, *loras)
    first, again = (engine.run(asked).images[0].tobytes() for _ in range(2))
    assert first == again
    assert first != engine.run(replace(asked, seed=12)).images[0].tobytes()


def batch(engine, method, loras):
    """Two pictures in one batch equal two singles; made one by one they are the same bytes as singles."""
    asked = request(method, *loras, count=2, sampler="default" if engine.backbone.joint else "euler-a")
    singles = torch.cat([latents(engine, asked.alone(index)) for index in range(2)])
    assert torch.equal(latents(engine, asked), singles)
    together = engine.together
    try:
        engine.together = 2
        same(latents(engine, asked), singles)
    finally:
        engine.together = together


def loop_or_batch(engine, method, loras):
    """One batch of rows or one row after another: the same prediction."""
    asked = request(method, *loras)
    same(latents(engine, replace(asked, batched=False)), latents(engine, asked))


def weight_counts(engine, method, loras):
    """Every LoRA's weight matters."""
    asked = request(method, *loras)
    whole = latents(engine, asked)
    for index in range(len(loras)):
        louder = [replace(lora, weight=lora.weight * 1.7) if i == index else lora for i, lora in enumerate(loras)]
        differ(latents(engine, replace(asked, loras=louder)), whole)


def weight_zero(engine, method, loras):
    """A LoRA of weight 0, or one that is on in none of the steps, is as if it were not there, wherever it stands."""
    asked = request(method, *loras[:2])
    without = latents(engine, asked)
    same(latents(engine, replace(asked, loras=[replace(loras[2], weight=0.0), *loras[:2]])), without)
    same(latents(engine, replace(asked, loras=[loras[0], replace(loras[2], start=0.99), loras[1]])), without)


def off_at_a_step(engine, method, loras):
    """At a step at which a LoRA is off the prediction is that of the others; at one at which it is on, as if it always were."""
    sampler = "default" if engine.backbone.joint else "euler"
    half = request(method, replace(loras[0], end=0.5), *loras[1:], sampler=sampler)
    for index in (STEPS - 2, STEPS - 1):
        same(prediction(engine, half, index), prediction(engine, replace(half, loras=loras[1:]), index))
    same(prediction(engine, half, 0), prediction(engine, replace(half, loras=loras), 0))


def one_set_a_step(engine, method, loras, sampler="heun"):
    """All evaluations of a step have the same LoRAs on; progress and what the notes count by steps follow steps."""
    asked = request(method, *loras, sampler=sampler, steps=4)
    kind, used = methods.find(method), {}
    with opened(engine, asked) as (run, times, start), pytest.MonkeyPatch.context() as patch:
        on: set[str] = set()
        for name, place in {"use": 0, "rows": 0, "regional": 0, "routed": 1}.items():
            honest = getattr(engine.adapters, name)

            def noted(*passed, honest=honest, place=place):
                weights = passed[place]
                on.update(key for row in (weights if isinstance(weights, list) else [weights]) for key, value in row.items() if value)
                return honest(*passed)

            patch.setattr(engine.adapters, name, noted)
        for name in ("routed", "combined"):
            plain = getattr(engine.adapters, name)

            def gated(function, weights, at, plain=plain):
                on.update(key for key, value in weights.items() if value)
                return plain(function, weights, at)

            patch.setattr(engine.adapters, name, gated)
        with kind.compose(run, kind.read(asked.options)) as predict:
            for (index, stage), t in zip(schedulers.stages(run.scheduler), times, strict=True):
                on.clear()
                value = predict(Step(index, asked.steps, t, start, stage)).value
                run.scheduler.step(value, t, start)
                used.setdefault(index, []).append(sorted(on))
        assert [len(sets) for sets in used.values()] == [2, 2, 2, 1]
        assert all(sets[0] == sets[-1] != [] for sets in used.values()), used
        turns = run.notes.get("leaders") or run.notes.get("cmlora", {}).get("leaders") or used
        assert len(turns) == asked.steps
    seen = []
    engine.run(asked, on_step=seen.append)
    assert [(event.index, event.count) for event in seen] == [(done, asked.steps) for done in (1, 2, 3, 4)]


def coverage(engine, method, loras):
    """A seam that saw less than it claims raises: here attention is computed past it, by a backend of its own."""

    def plain(query, key, value, attn_mask=None, **_):
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ value

    bounded = [replace(loras[0], region=(0.0, 0.0, 0.5, 1.0)), replace(loras[1], region=(0.5, 0.0, 1.0, 1.0))]
    options = {"clora": {"maps": "attention"}, "clora-fast": {"ask": "base"}}.get(method, {})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="native"):
        patch.setattr(F, "scaled_dot_product_attention", plain)
        engine.run(request(method, *bounded, options=options))


def own_place(engine, method, loras):
    """Of two LoRAs with regions, one everywhere and one nowhere, the picture is the first one's alone."""
    first, second = loras[:2]
    options = {"clora": {"update": False}, "clora-fast": {"overlap": "average"}}.get(method, {})
    for here in (first, second):
        pair = [replace(lora, region=WHOLE if lora is here else NOWHERE) for lora in (first, second)]
        same(latents(engine, request(method, *pair, steps=3, options=options)), merged(engine, here, steps=3), 1e-6)


def cached_is_full_at_age_0(engine, loras):
    """Passes of several LoRAs from slots that were just filled are the whole passes; refreshed at every step the cache changes nothing."""
    from composition.hooks import cache as caches

    with opened(engine, request("cmlora", *loras)) as (run, times, start):
        step, cache = Step(0, len(times), times[0], start), caches.of(engine.backbone.denoiser)
        with cache.attached():
            passes = run.passes(step)
            whole = run.denoise_passes(step, passes, cache=cache, full=run.names)
            same(run.denoise_passes(step, passes, cache=cache, full=()), whole, 1e-12)
            later = step._replace(t=times[-1], latents=start * 0.5)
            whole = run.denoise_passes(later, passes, cache=cache, full=run.names)
            same(run.denoise_passes(later, passes, cache=cache, full=()), whole, 1e-12)
    always = request("cmlora", *loras, options={"max_age": 0})
    same(latents(engine, always), latents(engine, replace(always, options={"cache": False})))


def half_precision(engine, exact, method, loras, bound, **changes):
    """From the same noise, the final latents lie within `bound` of those of `exact`, in units of their spread."""
    with pytest.MonkeyPatch.context() as patch:
        honest = engine.backbone.start

        def start(asked, scheduler, generators):
            noise, _ = exact.backbone.start(asked, schedulers.make(asked.sampler, exact.backbone.scheduler, asked.steps),
                                            [torch.Generator().manual_seed(seed) for seed in asked.seeds])
            return noise.to(engine.backbone.dtype), honest(asked, scheduler, generators)[1]

        patch.setattr(engine.backbone, "start", start)
        asked = request(method, *loras, **({"steps": 7} | changes))
        rounded, right = latents(engine, asked).double(), latents(exact, asked)
    assert rounded.isfinite().all()
    error = float((rounded - right).square().mean().sqrt() / right.std())
    assert 0 < error < bound, f"off by {error:.3g}"


def compiled_is_eager(compiled, eager, method, loras):
    """LoRAs that are turned on after the denoiser was compiled change the picture as they change the eager one, in one graph without breaks."""
    counters = torch._dynamo.utils.counters
    plain = latents(compiled, request("merge", steps=2))
    for some in (loras[:1], loras[1:]):  # the two are of different ranks
        counters.clear()
        asked = request(method, *some, steps=2)
        there = latents(compiled, asked)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
        differ(there, plain)
        same(there, latents(eager, asked))


def returned(engine, method, loras):
    """After success, exception and cancel everything is as before."""
    engine.backbone.encode(["the fox"], [""])  # transformers hooks a text encoder's layers for good when it is first asked for their outputs
    before = fingerprint(engine)
    asked = request(method, *loras)

    def fail(event):
        raise OSError("the disk is full")

    engine.run(asked)
    assert fingerprint(engine) == before, "after success"
    with pytest.raises(OSError, match="disk"):
        engine.run(asked, on_step=fail)
    assert fingerprint(engine) == before, "after an exception"
    for stop in (0, 2):
        flag = threading.Event()
        if not stop:
            flag.set()
        with pytest.raises(Cancelled):
            engine.run(asked, cancel=flag, on_step=lambda event, stop=stop, flag=flag: flag.set() if event.index == stop else None)
        assert fingerprint(engine) == before, "after a cancel"


def no_leak(engine, method, loras):
    """No tensor of a run is alive after it (what stays is what is kept by hash, the same after every run)."""
    leaves_nothing(engine, request(method, *loras))


def leaves_nothing(engine, asked):
    """After the second run of a request, as many tensors of every shape are alive as after the first."""

    def alive():
        gc.collect()
        own = (torch.Tensor, nn.Parameter)  # a compiler that ran before keeps tensors of unknown shape, of kinds of its own
        return sorted(tuple(item.shape) for item in gc.get_objects() if type(item) in own)

    gc.collect()
    gc.freeze()  # what is there already is looked at no more: most of the time went into that
    try:
        engine.run(asked)
        before = alive()
        result = engine.run(asked)
        after = alive()
    finally:
        gc.unfreeze()
    assert result.images and after == before


def fingerprint(engine):
    """Bytes, addresses and flags of every parameter; hooks; processors; scheduler; generators; stacks."""
    digest, where = hashlib.sha256(), []
    for model in engine.backbone.components.values():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
            where.append((name, value.data_ptr(), value.requires_grad))
        for name, module in model.named_modules():
            where.append((name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
                          type(getattr(module, "processor", None)).__name__, id(module.__dict__.get("stack")),
                          isinstance(module, nn.Module) and "forward" in module.__dict__))
    digest.update(torch.get_rng_state().numpy().tobytes())
    scheduler = engine.backbone.scheduler
    state = {name: value.tolist() if isinstance(value, torch.Tensor) else repr(value)
             for name, value in vars(scheduler).items()}
    return digest.hexdigest(), tuple(where), repr(state), torch.is_grad_enabled()


def loras_of(paths, weights=(1.0, 0.8, 0.6), binds=("the fox", "the owl", "the moon")):
    """LoRAs with weights and words of the laws' prompt: methods that place concepts need to know whose they are."""
    return [Lora(str(path), weight=weight, binds=words) for path, weight, words in zip(paths, weights, binds, strict=False)]
