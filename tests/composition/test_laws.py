"""Every method x every family, on toys with random weights, in float64."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from composition import Lora, methods
from composition.adapters.gates import Gates
from composition.adapters.stack import Stack
from tests import reference
from tests.composition import laws
from tests.composition.conftest import FAMILIES

ONE_ROW = ("merge", "composite", "cmlora", "clora-fast", "regions")  # asked again of the model without a negative row
CASES = [(family, name) for family in FAMILIES for name in methods.all() if family != "flux-dev" or name in ONE_ROW]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request, engines, lora_files):
    family, name = request.param
    return engines[family], name, laws.loras_of(lora_files[family])


@pytest.mark.parametrize("law", [laws.none_is_plain, laws.seeds, laws.batch, laws.loop_or_batch, laws.weight_counts,
                                 laws.returned, laws.no_leak])
def test_law(case, law):
    law(*case)


def test_one_is_merge(case):
    if methods.find(case[1]).single:
        laws.one_is_merge(*case)


def test_order(case):
    laws.order(*case, symmetric=methods.find(case[1]).symmetric)


@pytest.mark.parametrize("family", FAMILIES)
def test_twins(family, engines, lora_files):
    laws.twins(engines[family], "composite", laws.loras_of(lora_files[family]))


@pytest.mark.parametrize(("family", "sampler"), [
    (family, sampler) for family in FAMILIES
    for sampler in (["default"] if family in laws.FLOWS else ["ddim", "euler", "euler-a", "dpm++2m", "unipc"])])
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "live"])
def test_merge_is_the_stock_pipeline(family, sampler, fold, engines, lora_files):
    """Merge of two LoRAs against load_lora_weights + set_adapters + the stock call, two pictures."""
    from composition.backbones import schedulers

    engine, loras = engines[family], laws.loras_of(lora_files[family])[:2]
    pipe = FAMILIES[family](dtype=torch.float64)
    reference.load(pipe, lora_files[family][:2], [lora.weight for lora in loras])
    pipe.scheduler = schedulers.make(sampler, pipe.scheduler)
    asked = laws.request("merge", *loras, count=2, sampler=sampler, negative="an owl")
    generators = [torch.Generator().manual_seed(seed) for seed in asked.seeds]
    expected = reference.stock(pipe, asked.prompt, asked.negative, asked.steps, asked.guidance, generators)
    kept = engine.fold
    try:
        engine.fold = fold
        laws.same(laws.latents(engine, asked), expected, 1e-7)
    finally:
        engine.fold = kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["composite", "switch"])
def test_method_is_its_formula(family, method, engines, lora_files):
    """Composite and Switch against the paper's formulas on stock PEFT layers, text-encoder LoRAs included."""
    engine, loras = engines[family], laws.loras_of(lora_files[family])
    pipe, weights = FAMILIES[family](dtype=torch.float64), [lora.weight for lora in loras]
    names = reference.load(pipe, lora_files[family], weights)
    options = {"tau": 2} if method == "switch" else {}
    asked = laws.request(method, *loras, sampler="default" if family in laws.FLOWS else "ddim", options=options)
    if family not in laws.FLOWS:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    call = (pipe, names, weights, asked.prompt, asked.negative, asked.steps, asked.guidance,
            torch.Generator().manual_seed(asked.seed))
    expected = getattr(reference, method)(*call, **options)
    laws.same(laws.latents(engine, asked), expected, 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_lora_is_the_stock_pipeline(family, engines):
    engine, pipe = engines[family], FAMILIES[family](dtype=torch.float64)
    asked = laws.request("composite")
    generators = [torch.Generator().manual_seed(asked.seed)]
    expected = reference.stock(pipe, asked.prompt, "", asked.steps, asked.guidance, generators)
    laws.same(laws.latents(engine, asked), expected, 1e-9)


# mutants: each breaks the engine in one place, and a law must notice ----------------------------------------------


def _gate_dropped(monkeypatch):
    def deaf(self, weights):
        Gates._write_dense(self, [[1.0 if weight else 0.0 for weight in weights]])
        self.only = next((k for k, weight in enumerate(weights) if weight), 0)
        self.mode = "dense" if any(weights) else "off"

    monkeypatch.setattr(Gates, "use", deaf)


def _rows_swapped(monkeypatch):
    honest = Gates.per_row
    monkeypatch.setattr(Gates, "per_row", lambda self, weights: honest(self, [*weights[1:], weights[0]]))


def _alpha_ignored(monkeypatch):
    honest = Stack.__init__

    def deaf(self, factors, *rest, **named):
        honest(self, [part and replace(part, up=part.up * 2.0) for part in factors], *rest, **named)

    monkeypatch.setattr(Stack, "__init__", deaf)


def _against_stock(engine, family, files):
    loras = laws.loras_of(files)[1:2]
    pipe = FAMILIES[family](dtype=torch.float64)
    reference.load(pipe, files[1:2], [loras[0].weight])
    asked = laws.request("merge", *loras)
    generators = [torch.Generator().manual_seed(asked.seed)]
    expected = reference.stock(pipe, asked.prompt, "", asked.steps, asked.guidance, generators)
    laws.same(laws.latents(engine, asked), expected, 1e-7)


def test_mutant_gate_dropped(monkeypatch, engines, lora_files):
    engine = engines["sd"]
    kept, engine.fold = engine.fold, False
    try:
        laws.weight_counts(engine, "merge", laws.loras_of(lora_files["sd"]))
        _gate_dropped(monkeypatch)
        with pytest.raises(AssertionError):
            laws.weight_counts(engine, "merge", laws.loras_of(lora_files["sd"]))
    finally:
        engine.fold = kept


def test_mutant_rows_swapped(monkeypatch, engines, lora_files):
    _rows_swapped(monkeypatch)
    with pytest.raises(AssertionError):
        laws.loop_or_batch(engines["sd"], "composite", laws.loras_of(lora_files["sd"]))


def test_mutant_alpha_ignored(monkeypatch, engines, lora_files):
    _against_stock(engines["sd"], "sd", lora_files["sd"])
    _alpha_ignored(monkeypatch)
    with pytest.raises(AssertionError):
        _against_stock(engines["sd"], "sd", lora_files["sd"])


def test_mutant_state_kept(monkeypatch, engines, lora_files):
    """A run that leaves a hook behind, or moves a weight, is seen by the return law."""
    engine = engines["sd"]
    layer = engine.backbone.denoiser.conv_in
    honest = type(engine.backbone).decode

    def leaky(self, latents):
        layer.weight.data[0, 0, 0, 0] += 1e-3
        return honest(self, latents)

    monkeypatch.setattr(type(engine.backbone), "decode", leaky)
    original = layer.weight.detach().clone()
    with pytest.raises(AssertionError, match="after success"):
        laws.returned(engine, "merge", laws.loras_of(lora_files["sd"]))
    layer.weight.data.copy_(original)


def test_rows_must_match_the_batch(engines, lora_files):
    """A gate set for other rows than the denoiser's batch raises: nothing is applied to the wrong picture."""
    engine = engines["sd"]
    lora = Lora(str(lora_files["sd"][0]))
    with engine.adapters.session([("a", lora, lora_files["sd"][0])]), engine.adapters.rows([{"a": 1.0}, {}, {"a": 1.0}]):
        with pytest.raises(RuntimeError, match="rows"):
            toys_forward(engine.backbone.denoiser, rows=2)


def toys_forward(unet, rows):
    sample = torch.zeros(rows, unet.config.in_channels, 16, 16, dtype=unet.dtype)
    text = torch.zeros(rows, 5, unet.config.cross_attention_dim, dtype=unet.dtype)
    return unet(sample, 1, encoder_hidden_states=text).sample
