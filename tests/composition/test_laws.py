"""Every method x every family, on toys with random weights, in float64."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler

from composition import Engine, Lora, Request, backbones, methods
from composition.adapters import Adapters
from composition.adapters.gates import Gates
from composition.adapters.layers import Layers
from composition.adapters.stack import Stack
from composition.backbones import flux, schedulers
from composition.backbones.flux import FluxBackbone
from composition.hooks import masks, regional
from composition.hooks.cache import Cache
from composition.loop import Step
from composition.run import Run
from tests import reference
from tests.composition import laws
from tests.composition.conftest import FAMILIES

ONE_ROW = ("merge", "composite", "cmlora", "clora-fast", "regions")  # asked again of the model without a negative row
# Methods that change nothing but the factors or the gates of ranks: of these every law on one of the two families, and on one of the others.
FUSIONS = ("autolora", "depth", "entropy", "k-lora", "lego", "loratorio", "np-lora", "ranks", "ssr", "topk")
METHODS = [*(name for name in methods.all() if name not in FUSIONS), *FUSIONS]
CASES = [(family, name) for family in FAMILIES for name in methods.all() if family != "flux-dev" or name in ONE_ROW]


@pytest.fixture(autouse=True)
def shapes_checked_once(request):
    """Shapes are checked by one test alone, which goes through every method and family."""
    if request.node.originalname != "test_shapes":
        request.getfixturevalue("shapes_unchecked")


@pytest.fixture(scope="module")
def stock(lora_files):
    return Stock(lora_files)


class Stock:
    """Stock pipelines with their families' LoRA files in PEFT's layers, and what they draw: made once, used by many tests."""

    def __init__(self, files):
        self._files, self._pipes, self._drawn = files, {}, {}

    def pipe(self, family):
        """The pipeline with a new scheduler of its own kind, and the names of its adapters."""
        if family not in self._pipes:
            pipe = FAMILIES[family](dtype=torch.float64)
            self._pipes[family] = pipe, reference.load(pipe, self._files[family], [1.0] * len(self._files[family]))
            self._pipes[family] += (pipe.scheduler,)
        pipe, names, scheduler = self._pipes[family]
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        return pipe, names

    def draw(self, family, weights, asked):
        """Final latents of the stock call for this request with adapter k at weights[k], the others off."""
        key = family, tuple(weights.items()), repr(asked)
        if key not in self._drawn:
            pipe, names = self.pipe(family)
            pipe.scheduler = schedulers.make(asked.sampler, pipe.scheduler)
            pipe.set_adapters([names[k] for k in weights], list(weights.values()))
            generators = [torch.Generator().manual_seed(seed) for seed in asked.seeds]
            self._drawn[key] = reference.stock(pipe, asked.prompt, asked.negative, asked.steps, asked.guidance, generators, asked.size[0])
        return self._drawn[key]


def asked(family, name, engines, lora_files):
    """What a law asks for: the engine, the method, three LoRAs."""
    return engines[family], name, laws.loras_of(lora_files[family])


LAWS = (laws.none_is_plain, laws.seeds, laws.batch, laws.loop_or_batch, laws.weight_counts, laws.weight_zero, laws.off_at_a_step, laws.returned,
        laws.no_leak, laws.order, laws.one_is_merge)  # fmt: skip
WHOLE = ("sd", "flux")  # families on which every law is checked of every method; of the others every pair of two of the three
EVERY = 3


def combinations():
    """Every law with every method, every law with every family, every method with every family; all three together on two families."""
    for family, name in CASES:
        for number, law in enumerate(LAWS):
            turn = list(FAMILIES).index(family) + METHODS.index(name) + number
            due = law is not laws.one_is_merge or methods.find(name).single
            whole = family in WHOLE and (name not in FUSIONS or (WHOLE.index(family) + METHODS.index(name) + number) % 2 == 0)
            parting = law is laws.order and methods.find(name).regional  # places that two LoRAs claim alike
            if due and (whole or family not in WHOLE and (parting or turn % (2 * EVERY if name in FUSIONS else EVERY) == 0)):
                yield pytest.param(family, name, law, id=f"{family}-{name}-{law.__name__}")


@pytest.mark.parametrize(("family", "name", "law"), list(combinations()))
def test_law(family, name, law, engines, lora_files):
    law(*asked(family, name, engines, lora_files))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_shapes(family, name, engines, lora_files, monkeypatch):
    """Every shape in a signature is that of what is passed, in every method on every family, two pictures in a batch."""
    engine, method, loras = asked(family, name, engines, lora_files)
    monkeypatch.setattr(engine, "together", 2)
    assert engine.run(laws.request(method, *loras, count=2, negative="an owl")).images


@pytest.mark.parametrize("family", FAMILIES)
def test_twins(family, engines, lora_files):
    laws.twins(engines[family], "composite", laws.loras_of(lora_files[family]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["clora", "clora-fast", "regions"])
def test_own_place(family, method, engines, lora_files):
    laws.own_place(engines[family], method, laws.loras_of(lora_files[family]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["clora", "clora-fast", "regions"])
def test_coverage(family, method, engines, lora_files):
    laws.coverage(engines[family], method, laws.loras_of(lora_files[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_full_at_age_0(family, engines, lora_files):
    laws.cached_is_full_at_age_0(engines[family], laws.loras_of(lora_files[family]))


@pytest.mark.parametrize(("method", "sampler"), [(method, sampler) for method in methods.all() for sampler in ("heun", "dpm2", "dpm2-a")
                                                 if sampler == "heun" or method not in FUSIONS])
def test_one_set_a_step(method, sampler, engines, lora_files):
    laws.one_set_a_step(engines["sd"], method, laws.loras_of(lora_files["sd"]), sampler)


HALF = {torch.bfloat16: 0.04, torch.float16: 0.006}  # of the latents' spread, after seven steps at guidance 4
# Choices that are hard: masks that all steps keep, of noise that leaves no place so close to an edge that rounding moves it; and LoRAs or
# ranks chosen token by token, where every step has some that close: of those one step.
HARD = {"clora-fast": {"seed": 12}, "topk": {"steps": 1, "seed": 13}, "ranks": {"steps": 1}, "entropy": {"steps": 1}}


@pytest.fixture(scope="module")
def half_engines():
    return {(family, dtype): Engine(backbones.of(FAMILIES[family](dtype=dtype), family), "toy") for family in ("sd", "flux") for dtype in HALF}


@pytest.mark.parametrize(("method", "family", "dtype"), [  # every pair of two of the three
    (method, family, dtype) for row, method in enumerate(METHODS) for column, family in enumerate(["sd", "flux"])
    for number, dtype in enumerate(HALF) if (row + column + number) % 2])
def test_half_precision(method, family, dtype, engines, half_engines, lora_files):
    loras = laws.loras_of(lora_files[family])
    laws.half_precision(half_engines[family, dtype], engines[family], method, loras, HALF[dtype], **HARD.get(method, {}))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [("sd", "composite"), ("flux", "merge")])
def test_compiled_is_eager(family, method, engines, lora_files):
    laws.compiled_is_eager(_compiled(family), engines[family], method, laws.loras_of(lora_files[family]))


def _compiled(family):
    """An engine whose denoiser is compiled: FLUX's whole, of the UNet a block with attention and convolutions, which takes a fifth of the time."""
    torch.compiler.reset()  # what other tests compiled would count as our graphs' variants
    engine = Engine(backbones.of(FAMILIES[family](dtype=torch.float64), family), "toy", fold=False)
    denoiser = engine.backbone.denoiser
    (denoiser if family == "flux" else denoiser.down_blocks[0]).compile(backend="eager")
    return engine


def test_switch_with_heun_is_its_formula(engines, lora_files, stock):
    """One LoRA for the predictor and the corrector of each step, on stock PEFT layers and the stock scheduler."""
    engine, loras = engines["sd"], laws.loras_of(lora_files["sd"])
    (pipe, names), weights = stock.pipe("sd"), [lora.weight for lora in loras]
    asked = laws.request("switch", *loras, sampler="heun", options={"tau": 2}, steps=7)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)

    def combine(evaluation, predictor):
        return predictor(evaluation // 2 // 2 % 3)

    expected = reference.each(pipe, names, weights, asked.prompt, asked.negative, asked.steps, asked.guidance,
                              torch.Generator().manual_seed(asked.seed), combine, laws.SIDE)
    laws.same(laws.latents(engine, asked), expected, 1e-7)


@pytest.mark.parametrize(("family", "sampler"), [
    (family, sampler) for family in FAMILIES
    for sampler in (["default"] if family in laws.FLOWS else ["ddim", "euler", "euler-a", "dpm++2m", "unipc", "heun", "dpm2"])])
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "live"])
def test_merge_is_the_stock_pipeline(family, sampler, fold, engines, lora_files, stock):
    """Merge of two LoRAs against load_lora_weights + set_adapters + the stock call, two pictures."""
    engine, loras = engines[family], laws.loras_of(lora_files[family])[:2]
    asked = laws.request("merge", *loras, count=2, sampler=sampler, negative="an owl")
    expected = stock.draw(family, {k: lora.weight for k, lora in enumerate(loras)}, asked)
    kept = engine.fold
    try:
        engine.fold = fold
        laws.same(laws.latents(engine, asked), expected, 1e-7)
    finally:
        engine.fold = kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["composite", "switch"])
def test_method_is_its_formula(family, method, engines, lora_files, stock):
    """Composite and Switch against the paper's formulas on stock PEFT layers, text-encoder LoRAs included."""
    engine, loras = engines[family], laws.loras_of(lora_files[family])
    (pipe, names), weights = stock.pipe(family), [lora.weight for lora in loras]
    options = {"tau": 2} if method == "switch" else {}
    asked = laws.request(method, *loras, sampler="default" if family in laws.FLOWS else "ddim", options=options, steps=7 if method == "switch" else laws.STEPS)
    if family not in laws.FLOWS:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    call = (pipe, names, weights, asked.prompt, asked.negative, asked.steps, asked.guidance,
            torch.Generator().manual_seed(asked.seed))
    expected = getattr(reference, method)(*call, **options, side=laws.SIDE)
    laws.same(laws.latents(engine, asked), expected, 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_lora_is_the_stock_pipeline(family, engines):
    engine, pipe = engines[family], FAMILIES[family](dtype=torch.float64)
    asked = laws.request("composite")
    generators = [torch.Generator().manual_seed(asked.seed)]
    expected = reference.stock(pipe, asked.prompt, "", asked.steps, asked.guidance, generators, laws.SIDE)
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
        honest(self, [part and replace(part, alpha=None) for part in factors], *rest, **named)

    monkeypatch.setattr(Stack, "__init__", deaf)


def _against_stock(engine, family, files, stock, **changes):
    (lora,) = laws.loras_of(files)[1:2]
    asked = laws.request("merge", lora, **changes)
    laws.same(laws.latents(engine, asked), stock.draw(family, {1: lora.weight}, asked), 1e-7)


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


def test_mutant_alpha_ignored(monkeypatch, engines, lora_files, stock):
    _against_stock(engines["sd"], "sd", lora_files["sd"], stock)
    _alpha_ignored(monkeypatch)
    with pytest.raises(AssertionError):
        _against_stock(engines["sd"], "sd", lora_files["sd"], stock)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [
    (Layers, "prepare", lambda self: None),
    (Stack, "_owners", lambda self, device: torch.arange(len(self.spans)).repeat_interleave(torch.tensor([b - a for a, b in self.spans]))),
], ids=["first forward another", "length from a tensor"])  # fmt: skip
def test_mutant_graphs(mutant, monkeypatch, engines, lora_files):
    """Factors laid out by the first forward are a second graph; ranks that a tensor tells are a break in every layer."""
    owner, name, broken = mutant
    monkeypatch.setattr(owner, name, broken)
    if owner is Stack:
        monkeypatch.setattr(Layers, "prepare", lambda self: None)
    with pytest.raises(AssertionError):
        laws.compiled_is_eager(_compiled("sd"), engines["sd"], "composite", laws.loras_of(lora_files["sd"]))


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


def test_mutant_latents_kept(monkeypatch, engines, lora_files):
    kept, honest = [], type(engines["flux"].backbone).decode
    monkeypatch.setattr(type(engines["flux"].backbone), "decode", lambda self, latents: kept.append(latents.clone()) or honest(self, latents))
    with pytest.raises(AssertionError):
        laws.no_leak(engines["flux"], "merge", laws.loras_of(lora_files["flux"]))


def test_mutant_weight_zero_takes_turns(monkeypatch, engines, lora_files):
    monkeypatch.setattr(Request, "active", property(lambda self: dict(zip(self.names, self.loras, strict=True))))
    monkeypatch.setattr(Run, "live", lambda self, step: self.request.weights)
    with pytest.raises(AssertionError):
        laws.weight_zero(engines["sd"], "switch", laws.loras_of(lora_files["sd"]))


def test_mutant_stages_are_steps(monkeypatch, engines, lora_files):
    monkeypatch.setattr(schedulers, "stages", lambda scheduler: [(index, 0) for index in range(len(scheduler.timesteps))])
    with pytest.raises(AssertionError):
        laws.one_set_a_step(engines["sd"], "switch", laws.loras_of(lora_files["sd"]))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_mutant_cache_never_refreshed(family, monkeypatch, engines, lora_files):
    """A slot that was filled once keeps its first features."""
    honest = Cache.full

    @contextmanager
    def stale(self, names):
        before = dict(self._slots)
        with honest(self, names):
            yield
        self._slots |= before

    for kind in Cache.__subclasses__():
        monkeypatch.setattr(kind, "full", stale)
    with pytest.raises(AssertionError):
        laws.cached_is_full_at_age_0(engines[family], laws.loras_of(lora_files[family]))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_mutant_cache_slots_swapped(family, monkeypatch, engines, lora_files):
    honest = Cache.cached
    monkeypatch.setattr(Cache, "cached", lambda self, names: honest(self, names[::-1]))
    with pytest.raises(AssertionError):
        laws.cached_is_full_at_age_0(engines[family], laws.loras_of(lora_files[family]))


@pytest.mark.parametrize("method", ["clora", "clora-fast", "regions"])
@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("broken", [
    lambda honest: lambda places: torch.full_like(honest(places), 1 / (places.shape[1] + 1)),
    lambda honest: lambda places: honest(places.flip(1)),
], ids=["ignored", "swapped"])  # fmt: skip
def test_mutant_masks(broken, family, method, monkeypatch, engines, lora_files):
    monkeypatch.setattr(masks, "shares", broken(masks.shares))
    with pytest.raises(AssertionError):
        laws.own_place(engines[family], method, laws.loras_of(lora_files[family]))


@pytest.mark.parametrize("method", ["clora-fast", "regions"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_mutant_regional_gates_dropped(family, method, monkeypatch, engines, lora_files):
    """Every LoRA acts everywhere at its weight."""

    @contextmanager
    def everywhere(self, weights, places):
        self.use(weights)
        yield

    monkeypatch.setattr(Adapters, "regional", everywhere)
    with pytest.raises(AssertionError):
        laws.own_place(engines[family], method, laws.loras_of(lora_files[family]))


@pytest.mark.parametrize("method", ["clora-fast", "regions"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_mutant_regional_text_swapped(family, method, monkeypatch, engines, lora_files):
    """The prompts of two segments in each other's place: encoded with the other one's text encoder, under the other one's gates."""
    honest = regional.joined
    monkeypatch.setattr("composition.run.joined", lambda conds, shares: honest([conds[0], *conds[:0:-1]], shares))
    with pytest.raises(AssertionError):
        laws.own_place(engines[family], method, laws.loras_of(lora_files[family]))


def test_mutant_flux_guidance_ignored(monkeypatch, engines, lora_files, stock):
    _against_stock(engines["flux-dev"], "flux-dev", lora_files["flux-dev"], stock)
    monkeypatch.setattr(FluxBackbone, "embedded_guidance", lambda self, request: None)
    with pytest.raises(AssertionError):
        _against_stock(engines["flux-dev"], "flux-dev", lora_files["flux-dev"], stock)


def test_mutant_flux_packing_transposed(monkeypatch, engines, lora_files, stock):
    """Rows for columns, there and back."""
    packed, unpacked = flux.packed, flux.unpacked
    monkeypatch.setattr(flux, "packed", lambda latents: packed(latents.transpose(-1, -2)))
    monkeypatch.setattr(flux, "unpacked", lambda tokens, size: unpacked(tokens, size[::-1]).transpose(-1, -2))
    with pytest.raises(AssertionError):
        _against_stock(engines["flux"], "flux", lora_files["flux"], stock)


def test_mutant_flux_rows_swapped(monkeypatch, engines, lora_files, stock):
    honest = FluxBackbone.denoise
    monkeypatch.setattr(FluxBackbone, "denoise", lambda self, latents, t, cond: honest(self, latents, t, cond).flip(0))
    with pytest.raises(AssertionError):
        _against_stock(engines["flux"], "flux", lora_files["flux"], stock)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_layers_can_be_combined_by_path_and_step(family, engines, lora_files):
    """By their sum a combined prediction is the plain one; by a function of path and step it is another."""
    with laws.opened(engines[family], laws.request("merge", *laws.loras_of(lora_files[family]))) as (run, times, start):
        step, seen = Step(3, len(times), times[3], start), set()

        def summed(path, at, base, each):
            seen.add((path, at.index))
            return base + each.sum(0)

        laws.same(run.denoise(step, combine=summed), run.denoise(step))
        paths = {path for path, _ in seen}
        assert {index for _, index in seen} == {3} and paths < {path for path, _ in run.backbone.denoiser.named_modules()}
        laws.differ(run.denoise(step, combine=lambda path, at, base, each: base + each[at.index % len(each)]), run.denoise(step))


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
