"""The laws every method obeys, as functions that raise AssertionError: the tests run them, the mutants must break them."""

import gc
import hashlib
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from composition import Cancelled, Engine, Lora, Request

STEPS = 7
FLOWS = ("sd3", "flux", "flux-dev")  # families that predict a flow: their one sampler is their own
LIGHT = {"clora": {"until": 0.5, "rounds": 0}}  # options that make a method cheap enough to be asked often


def request(method, *loras, **changes):
    fields = {"prompt": "the fox and the owl on the moon", "negative": "", "loras": loras, "method": method, "options": LIGHT.get(method, {}),
              "steps": STEPS, "guidance": 4.0, "seed": 11}
    return Request(**(fields | changes))


def latents(engine: Engine, asked: Request) -> torch.Tensor:
    """The final latents of a request, all its pictures in order."""
    last = {}
    engine.run(asked, on_step=lambda event: last.__setitem__(event.picture, event.latents.clone()))
    return torch.cat([last[picture] for picture in sorted(last)])


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
    same(latents(engine, request(method, loras[0])), latents(engine, request("merge", loras[0])))


def none_is_plain(engine, method, loras):
    """No LoRA: every method is the base alone."""
    same(latents(engine, request(method)), latents(engine, request("merge")))


def twins(engine, method, loras):
    """Two equal LoRAs, asked one by one, equal one."""
    same(latents(engine, request(method, loras[0], loras[0])), latents(engine, request(method, loras[0])))


def order(engine, method, loras, symmetric):
    """Symmetric methods ignore the order of the LoRAs; the others must not."""
    there, back = (latents(engine, request(method, *way)) for way in (loras, loras[::-1]))
    same(there, back) if symmetric else differ(there, back)


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
    """Every LoRA's weight matters, and weight 0 is as if it were not there."""
    asked = request(method, *loras, steps=12)
    whole = latents(engine, asked)
    for index in range(len(loras)):
        louder = [replace(lora, weight=lora.weight * 1.7) if i == index else lora for i, lora in enumerate(loras)]
        differ(latents(engine, replace(asked, loras=louder)), whole)


def returned(engine, method, loras):
    """After success, exception and cancel everything is as before."""
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
    asked = request(method, *loras)

    def alive():
        gc.collect()
        return sorted(tuple(item.shape) for item in gc.get_objects() if issubclass(type(item), torch.Tensor))

    engine.run(asked)
    before = alive()
    result = engine.run(asked)
    after = alive()
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
