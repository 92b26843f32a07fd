"""Only the LoRAs that the prompt names, whichever method adds them up."""

from dataclasses import replace

import pytest
import torch

from composition import Request, named
from tests.composition import laws


@pytest.fixture
def case(engines, lora_files):
    loras = [replace(lora, binds=None, triggers=(word,)) for lora, word in zip(laws.loras_of(lora_files["sd"]), ("fox", "wolf", "moon"), strict=True)]
    return engines["sd"], loras


@pytest.mark.parametrize("method", ["merge", "composite", "ssr", "autolora", "cmlora"])
def test_as_if_the_others_were_not_loaded(case, method):
    engine, loras = case
    asked = laws.request(method, *loras, named_only=True)
    only = replace(asked, loras=[loras[0], loras[2]], named_only=False)
    assert torch.equal(laws.latents(engine, asked), laws.latents(engine, only))
    laws.differ(laws.latents(engine, replace(asked, named_only=False)), laws.latents(engine, only))


def test_what_is_named_otherwise_stays_and_it_is_recorded(case):
    """Bound to words, with a region, or without trigger words: on. The settled request says who is off, and settles to itself."""
    engine, loras = case
    bound, region = replace(loras[1], binds="the owl"), replace(loras[1], region=(0.0, 0.0, 0.5, 1.0))
    nameless = replace(loras[1], triggers=())
    for lora in (bound, region, nameless):
        assert engine.settle(laws.request("merge", lora, named_only=True))[0].loras[0].weight == lora.weight
    request, _ = engine.settle(laws.request("merge", *loras, named_only=True))
    assert [lora.weight for lora in request.loras] == [loras[0].weight, 0.0, loras[2].weight]
    assert engine.settle(request)[0] == request
    result = engine.run(request)
    assert result.notes[named.NOTE] == [request.names[1]] and "missing triggers" not in result.notes
    assert Request.read(request.json()) == request
    assert named.NOTE not in engine.run(replace(request, named_only=False)).notes
