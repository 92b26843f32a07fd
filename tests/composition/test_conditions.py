"""Conditions of a request: equal to one masked forward with LoRAs on, exact when they are off, read once, beside every method."""

import base64
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from composition import Cancelled, Condition, Engine, Lora, Refused, Request, backbones, conditions, methods
from composition.backbones.flux import FluxBackbone, packed, places
from composition.conditions import Conditions, ids, pixels, spatial_ids, subject_ids
from composition.hooks import cache as caches
from composition.loop import Step
from composition.loras import condition
from composition.loras.condition import Settings
from composition.run import Pass
from tests import toys
from tests.composition import conditioned, laws
from tests.one_pass import PICTURE, TEXT, Controlled, OnePass, Style, rotated

SIDE = 16  # pixels of a toy's condition: 4 x 4 tokens of 4 pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two condition LoRAs, a picture, and two LoRAs that leave the text encoders alone."""
    folder = tmp_path_factory.mktemp("conditions")
    conditioned.write(folder / "edges.safetensors", conditioned.factors(seed=1), kind="spatial", size=SIDE, alpha=2.0)
    conditioned.write(folder / "subject.safetensors", conditioned.factors(seed=2, rank=2), size=SIDE)
    Image.fromarray((np.random.default_rng(0).random((24, 40, 3)) * 255).astype(np.uint8)).save(folder / "photo.png")
    Image.fromarray((np.random.default_rng(1).random((40, 24, 3)) * 255).astype(np.uint8)).save(folder / "thing.png")
    pipe = toys.flux(dtype=torch.float64)
    for seed in (1, 2):
        toys.lora(pipe, folder / f"style{seed}.safetensors", seed=seed, text=False)
    return folder


@pytest.fixture(scope="module")
def engines(folder):
    return {name: Engine(backbones.of(make(dtype=torch.float64), "flux"), "toy", folders=[folder])
            for name, make in (("flux", toys.flux), ("flux-dev", toys.flux_distilled))}


@pytest.fixture(params=["flux", "flux-dev"])
def engine(request, engines):
    return engines[request.param]


@pytest.fixture
def exactly_rotated(monkeypatch):
    monkeypatch.setattr("diffusers.models.transformers.transformer_flux.apply_rotary_emb", rotated)


@pytest.fixture(autouse=True)
def shapes_checked_once(request):
    if "equals" not in request.node.name and "maps" not in request.node.name:
        request.getfixturevalue("shapes_unchecked")


def edges(folder, **changes):
    return Condition("edges", str(folder / "photo.png"), annotator="", **changes)


def subject(folder, **changes):
    return Condition("subject", str(folder / "thing.png"), annotator="", **changes)


def request(method, folder, controls=(), **changes):
    loras = [Lora(str(folder / "style1.safetensors"), binds="the fox", region=(0, 0, 0.5, 1)),
             Lora(str(folder / "style2.safetensors"), weight=0.8, binds="the owl", region=(0.5, 0, 1, 1))]
    return laws.request(method, *changes.pop("loras", loras), conditions=controls, **({"steps": 3} | changes))


class Opened:
    """A run of a request at its first step, with its conditions read."""

    def __init__(self, engine, asked, isolated):
        self.context = laws.opened(engine, asked)
        self.run, self.times, self.start = self.context.__enter__()
        asked, backbone = self.run.request, engine.backbone
        paths = {name: engine.find_condition(item.source) for name, item in asked.controls.items()}
        self.reads = conditions.read(backbone, asked.controls, {name: condition.read(path, backbone.denoiser) for name, path in paths.items()},
                                     {name: decoded(item.image) for name, item in asked.controls.items()}, backbone.size(asked))
        self.run.conditions = Conditions(backbone, self.reads, isolated=isolated)
        self.run.read_conditions()
        self.step = Step(0, len(self.times), self.times[0], self.start)


def decoded(image):
    """The picture of a settled condition."""
    return Image.open(io.BytesIO(base64.b64decode(image.partition("base64,")[2])))


@pytest.fixture
def opened():
    """Opens runs, and closes them."""
    kept = []

    def make(engine, asked, isolated=True):
        kept.append(Opened(engine, asked, isolated))
        return kept[-1]

    yield make
    for item in reversed(kept):
        item.context.__exit__(None, None, None)


def reference(engine, run, cond, latents, t, styles=(), bias=None, pooled=None, text=None):
    """One masked forward of every guidance row. pooled: of the conditions' modulation."""
    whole = OnePass(engine.backbone.denoiser, styles, bias)
    guidance = run.request.guidance if engine.backbone.distilled else None
    rows = []
    for row in range(cond.rows):
        controlled = [
            Controlled(read.tokens, read.ids, _own(read), read.condition.strength, pooled=None if pooled is None else pooled[row])
            for read in run.conditions.reads.values()]
        rows.append(whole(packed(latents), places(latents), cond.values["text"][row], float(t) / 1000, cond.values["pooled"][row], guidance, controlled))
    return torch.stack(rows), whole


def _own(read):
    pairs = {path: (layer.stored_down, layer.stored_up) for path, layer in read.lora.adapters[0].items()}
    alpha = read.lora.settings.alpha
    return {path: (down, up, read.condition.weight * (alpha or len(down)) / len(down), path.endswith("to_out.0")) for path, (down, up) in pairs.items()}


def style(file, weight, gates, nowhere=None):
    tensors = load_file(file)
    paths = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")}
    updates = {path: weight * tensors[f"transformer.{path}.lora_B.weight"].double() @ tensors[f"transformer.{path}.lora_A.weight"].double()
               for path in paths}
    return Style(updates, gates, 1.0 if nowhere is None else nowhere)


def tokens(value):
    return torch.stack([packed(row) for row in value])


# equality --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exactly_rotated")
@pytest.mark.parametrize("both", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "shared"])
def test_equals_one_masked_forward_with_style_loras(both, isolated, engine, folder, opened):
    """Isolated, the LoRAs act on prompt and picture alone; shared, on the conditions too."""
    controls = [edges(folder, strength=0.4, weight=0.7), *([subject(folder)] if both else [])]
    there = opened(engine, request("merge", folder, controls, guidance=3.0, size=(32, 24)), isolated)
    run, step = there.run, there.step
    gates = {TEXT: 1.0, PICTURE: 1.0} | ({} if isolated else {0: 1.0, 1: 1.0})
    styles = [style(folder / f"style{k}.safetensors", w, gates) for k, w in ((1, 1.0), (2, 0.8))]
    wanted, _ = reference(engine, run, run.encode(), step.latents, step.t, styles)
    laws.same(tokens(run.denoise(step)), wanted, 1e-10)
    if not engine.backbone.distilled:
        laws.same(tokens(run.denoise(step, rows="positive")), wanted[1:], 1e-10)


@pytest.mark.usefixtures("exactly_rotated")
def test_equals_one_masked_forward_with_regional_loras(engine, folder, opened):
    """Each LoRA and its own prompt in its half; the conditions in all of it, read by the bare base."""
    there = opened(engine, request("regions", folder, [edges(folder), subject(folder, strength=2.0)], guidance=3.0, size=(32, 32)))
    run, step = there.run, there.step
    half = torch.zeros(16, 16, dtype=torch.float64)
    half[:, :8] = 1.0
    shares = torch.stack([torch.zeros_like(half), half, 1 - half])[None]
    words = ["an owl", "the fox on the moon", "the owl"]
    segments = [Pass(use, run.encode(text, {})) for text, use in zip(words, ({}, {"style1": 1.0}, {"style2": 0.8}), strict=True)]
    out = run.denoise_regional(step, segments, shares)
    # the same by hand: 24 words a segment, 8 x 8 tokens of the picture
    count, left = 24, torch.zeros(8, 8, dtype=torch.bool)
    left[:, :4] = True
    owner = torch.arange(3).repeat_interleave(count)
    place = torch.where(left.flatten(), 1, 2)
    mask = torch.zeros(3 * count + 64, 3 * count + 64, dtype=torch.bool)
    mask[: 3 * count, : 3 * count] = owner[:, None] == owner
    mask[3 * count :, 3 * count :] = True
    mask[: 3 * count, 3 * count :] = owner[:, None] == place
    mask[3 * count :, : 3 * count] = place[:, None] == owner
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    styles = [style(folder / f"style{k}.safetensors", w, {TEXT: (owner == k).double()[None, :, None], PICTURE: (place == k).double()[None, :, None]})
              for k, w in ((1, 1.0), (2, 0.8))]
    joint = {name: torch.cat([item.cond.values[name] for item in segments], 2 if name == "text" else 1) for name in ("text", "pooled")}
    cond = type(segments[0].cond)({"text": joint["text"], "pooled": (joint["pooled"][:, 1:2] + joint["pooled"][:, 2:]) / 2})
    wanted, _ = reference(engine, run, cond, step.latents, step.t, styles, bias, pooled=run.encode(use={}).values["pooled"])
    laws.same(tokens(out), wanted, 1e-10)


@pytest.mark.usefixtures("exactly_rotated")
def test_folded_equals_live(engines, folder):
    engine, asked = engines["flux"], request("merge", folder, [edges(folder)], steps=4)
    folded = laws.latents(engine, asked)
    try:
        engine.fold = False
        laws.same(laws.latents(engine, asked), folded, 1e-9)
    finally:
        engine.fold = True


def test_passes_in_one_batch_or_one_by_one(engine, folder):
    asked = request("composite", folder, [edges(folder, strength=0.5), subject(folder)])
    laws.same(laws.latents(engine, replace(asked, batched=False)), laws.latents(engine, asked))


def test_order_does_not_matter(engine, folder):
    there, back = (laws.latents(engine, request("merge", folder, way)) for way in ([edges(folder), subject(folder)], [subject(folder), edges(folder)]))
    laws.same(there, back)
    laws.differ(there, laws.latents(engine, request("merge", folder, [edges(folder)])))


# off, exactly ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["merge", "composite"])
def test_off_is_not_there_bit_for_bit(method, engine, folder):
    """Of strength 0, or on in none of the steps: the picture without conditions."""
    plain = laws.latents(engine, request(method, folder))
    for control in (edges(folder, strength=0.0), subject(folder, start=0.9, end=0.95)):
        assert torch.equal(laws.latents(engine, request(method, folder, [control])), plain)
    laws.differ(laws.latents(engine, request(method, folder, [edges(folder)])), plain)


def test_on_while_its_window_lasts(engine, folder, opened):
    """At a step outside it the prediction is that without the condition, bit for bit; inside, as if it always were on."""
    whole, half, none = (opened(engine, request("merge", folder, controls, steps=4)) for controls in ([edges(folder)], [edges(folder, start=0.25, end=0.75)], []))
    for index, same in enumerate((none, whole, whole, none)):
        step = Step(index, 4, half.times[index], half.start)
        assert torch.equal(half.run.denoise(step), same.run.denoise(step))


# read once -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def readings(monkeypatch):
    """Calls of the forward that fills a bank."""
    calls, honest = [], FluxBackbone.read_alone
    monkeypatch.setattr(FluxBackbone, "read_alone", lambda self, *args: (calls.append(args), honest(self, *args))[1])
    return calls


def test_one_bank_for_all_steps_seeds_and_batches(engine, folder, readings):
    asked = request("merge", folder, [edges(folder), subject(folder)], count=3)
    singles = laws.latents(engine, asked)
    assert len(readings) == 2
    together = engine.together
    try:
        engine.together = 3
        laws.same(laws.latents(engine, asked), singles)
    finally:
        engine.together = together
    assert len(readings) == 4
    with engine.group():
        for seed in (1, 2):
            engine.run(replace(asked, seed=seed, count=1))
    assert len(readings) == 6


def test_a_bank_is_read_anew_when_what_it_depends_on_changes(engine, folder, readings):
    """Pooled prompt, guidance that is embedded, weight, picture, size of a picture, LoRAs that act on it; nothing else."""
    Image.open(folder / "photo.png").rotate(180).save(folder / "turned.png")
    distilled, asked = engine.backbone.distilled, request("merge", folder, [edges(folder)], loras=[], steps=1)
    again = {
        "prompt": (replace(asked, prompt="the owl"), 1), "guidance": (replace(asked, guidance=2.0), int(distilled)),
        "weight": (replace(asked, conditions=[edges(folder, weight=0.5)]), 1), "strength": (replace(asked, conditions=[edges(folder, strength=0.5)]), 0),
        "window": (replace(asked, conditions=[edges(folder, end=0.5)]), 0), "picture": (replace(asked, conditions=[replace(edges(folder), image=str(folder / "turned.png"))]), 1),
        "size": (replace(asked, size=(32, 48)), 1), "kind": (replace(asked, conditions=[edges(folder, kind="subject")]), 1),
        "seed": (replace(asked, seed=9), 0), "steps": (replace(asked, steps=2), 0), "negative": (replace(asked, negative="owl"), int(not distilled)),
    }  # fmt: skip
    with engine.group():
        for what, (changed, expected) in again.items():
            engine.run(asked)
            before = len(readings)
            engine.run(changed)
            assert len(readings) - before == expected, what


def test_a_bank_does_not_depend_on_t5_tokens(engine, folder, opened):
    """Two conditionings of one pooled prompt and different words fill the same bank, which is not computed again."""
    there = opened(engine, request("merge", folder, [edges(folder)]))
    run, filled = there.run, dict(there.run.conditions._filled)
    other = run.encode("an owl", {})
    cond = type(other)({**run.encode(use={}).values, "text": other.values["text"]})
    run.conditions.fill(lambda: cond, run.adapters, {}, lambda: pytest.fail("read again"))
    assert run.conditions._filled == filled


def test_loras_change_a_bank_only_where_it_is_shared(engine, folder, opened):
    """Merge of a LoRA is read with it on; Composite, which varies them, by the bare base whatever LoRAs there are."""
    first, second = request("merge", folder).loras
    banks = [opened(engine, request("merge", folder, [edges(folder)], loras=loras), isolated).run.conditions._filled["edges"].layers["transformer_blocks.1.attn"].key
             for loras, isolated in (([first], False), ([second], False), ([first], True), ([second], True), ([], False))]
    laws.differ(banks[0], banks[1])
    assert torch.equal(banks[2], banks[3]) and torch.equal(banks[3], banks[4])


# beside every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.all())
def test_every_method_runs_and_returns_everything(method, engines, folder):
    """The condition changes the picture, and afterwards, after a failure and after a cancel everything is as before."""
    engine, asked = engines["flux"], request(method, folder, [edges(folder), subject(folder, strength=0.5, end=0.5)])
    before = laws.fingerprint(engine)
    laws.differ(laws.latents(engine, asked), laws.latents(engine, replace(asked, conditions=())))
    assert laws.fingerprint(engine) == before, "after success"
    flag = threading.Event()
    with pytest.raises(Cancelled):
        engine.run(asked, cancel=flag, on_step=lambda event: flag.set())
    assert laws.fingerprint(engine) == before, "after a cancel"
    with pytest.raises(OSError, match="disk"):
        engine.run(asked, on_step=_fail)
    assert laws.fingerprint(engine) == before, "after an exception"


def _fail(event):
    raise OSError("the disk is full")


def test_interrupted_while_it_is_read(engines, folder, monkeypatch):
    """Ctrl-C in the middle of filling a bank leaves nothing."""
    engine, asked = engines["flux"], request("composite", folder, [edges(folder)])
    plain, before = laws.latents(engine, asked), laws.fingerprint(engine)
    honest = FluxBackbone.read_alone

    def stopped(self, *args):
        honest(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FluxBackbone, "read_alone", stopped)
        engine.run(asked)
    assert laws.fingerprint(engine) == before
    assert torch.equal(laws.latents(engine, asked), plain)


def test_no_tensor_of_a_run_is_alive_after_it(engines, folder):
    laws.leaves_nothing(engines["flux"], request("composite", folder, [edges(folder)]))


@pytest.mark.slow
def test_on_a_denoiser_that_was_compiled_before(engines, folder, shapes_unchecked):
    """Banks are read and left in the same compiled denoiser."""
    torch.compiler.reset()
    compiled = Engine(backbones.of(toys.flux(dtype=torch.float64), "flux"), "toy", folders=[folder], fold=False)
    compiled.backbone.denoiser.compile(backend="eager")
    for controls in ([], [edges(folder)], []):
        asked = request("merge", folder, controls, loras=[], steps=1)
        laws.same(laws.latents(compiled, asked), laws.latents(engines["flux"], asked), 1e-9)


def test_cached_passes_beside_banks(engine, folder, opened):
    """From slots that were just filled, the whole passes; from slots of other conditions, a whole pass again."""
    there = opened(engine, request("cmlora", folder, [edges(folder, end=0.5)], steps=4))
    run, cache = there.run, caches.of(engine.backbone.denoiser)
    first, last = (Step(index, 4, there.times[index], there.start) for index in (0, 3))
    with cache.attached():
        passes = run.passes(first)
        whole = run.denoise_passes(first, passes, cache=cache, full=run.names)
        laws.same(run.denoise_passes(first, passes, cache=cache, full=()), whole, 1e-12)
        before = run.notes["evaluations"]
        later = run.denoise_passes(last, run.passes(last), cache=cache, full=())
        assert run.notes["evaluations"] - before == pytest.approx(len(passes))
        laws.same(later, run.denoise_passes(last, run.passes(last)), 1e-12)


@pytest.mark.usefixtures("exactly_rotated")
def test_attention_maps_beside_banks(engine, folder, opened):
    """Where a word attends to is what the masked forward has there: the condition's columns take their share and are no place."""
    there = opened(engine, request("merge", folder, [edges(folder, strength=3.0)], loras=[], guidance=3.0, size=(32, 32)))
    run, step, layer = there.run, there.step, "transformer_blocks.1.attn"
    maps = run.attention_maps(step, [Pass({}, run.encode())], [layer])
    _, whole = reference(engine, run, run.encode().positive(), step.latents, step.t)
    wanted = whole.seen[layer].mean(1)[:, :24, 24:88].unflatten(-1, (8, 8))
    laws.same(maps[0, 0].double(), wanted, 1e-10)


# pictures and places ---------------------------------------------------------------------------------------------------


def test_spatial_ids_stretch_over_the_picture():
    """512 px over 1024: every second place; 512 over 720 x 992 by each side's own ratio; bfloat16 rounds by an eighth at most."""
    assert spatial_ids((32, 32), (64, 64)).view(32, 32, 3)[3, 5].tolist() == [0, 6, 10]
    places_ = spatial_ids((32, 32), (45, 62)).view(32, 32, 3)
    assert places_[31, 31].tolist() == pytest.approx([0, 31 * 45 / 32, 31 * 62 / 32])
    rounded = spatial_ids((32, 32), (45, 62), rounded=True).view(32, 32, 3)
    assert 0 < float((rounded - places_).abs().max()) <= 0.125
    for side in (32, 48, 64, 80, 96):
        assert torch.equal(spatial_ids((32, 32), (side, side), rounded=True), spatial_ids((32, 32), (side, side)))


def test_subject_ids_lie_below_the_picture():
    assert subject_ids((32, 32), 64).view(32, 32, 3)[[0, 31], [0, 31]].tolist() == [[0, 64, 0], [0, 95, 31]]
    usual = Settings(kind="subject")
    assert ids(usual, (64, 64), (32, 32))[0].tolist() == [0, 64, 0] and ids(usual, (96, 64), (32, 32))[0].tolist() == [0, 96, 0]
    assert ids(replace(usual, clear=False), (96, 64), (32, 32))[0].tolist() == [0, 64, 0]


def test_what_is_encoded():
    """A spatial picture is stretched to a square, a subject keeps its shape in the middle of its ground, which shows through what is clear."""
    wide = Image.new("RGB", (80, 20), (255, 0, 0))
    stretched = pixels(wide, Settings(size=35), 8)
    assert stretched.shape == (1, 3, 32, 32) and stretched[0, 0].eq(1).all() and stretched[0, 1:].eq(-1).all()
    middle = pixels(wide, Settings(kind="subject", size=32, pad="white"), 8)
    assert middle[0, 1, 12:20].eq(-1).all() and middle[0, :, :12].eq(1).all() and middle[0, :, 20:].eq(1).all()
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert pixels(clear, Settings(size=16, pad="#ffffff"), 8).eq(1).all() and pixels(clear, Settings(size=16), 8).eq(-1).all()


# doors -----------------------------------------------------------------------------------------------------------------


def test_a_family_that_cannot_says_so(folder):
    other = Engine(backbones.of(toys.sd3(dtype=torch.float64), "sd3"), "toy", folders=[folder])
    with pytest.raises(Refused, match="conditions"):
        other.run(request("merge", folder, [edges(folder)], loras=[]))


@pytest.mark.parametrize("source, words", [
    ("edgse", "did you mean 'edges'"), ("style1", "no condition LoRA"), ("broken", "damaged"), ("wide", "another width"), ("deep", "no layer"),
])
def test_a_file_that_cannot_be_read_is_refused(source, words, engines, folder):
    (folder / "broken.safetensors").write_bytes(b"\0" * 5)
    conditioned.write(folder / "wide.safetensors", conditioned.factors(width=48))
    conditioned.write(folder / "deep.safetensors", conditioned.factors(single=3))
    before = laws.fingerprint(engines["flux"])
    with pytest.raises(Refused, match=words):
        engines["flux"].run(request("merge", folder, [replace(edges(folder), source=source)], loras=[]))
    assert laws.fingerprint(engines["flux"]) == before


def test_a_condition_lora_is_no_lora(engines, folder):
    with pytest.raises(Refused, match="condition LoRA"):
        engines["flux"].run(laws.request("merge", Lora("edges")))


def test_a_file_of_several_serves_as_many_conditions(engines, folder):
    """The second condition that names a file of two reads with its second; a third is refused."""
    one, two = (conditioned.factors(seed=seed) for seed in (7, 8))
    both = one | {key.replace("loras.0", "loras.1"): pair for key, pair in two.items()}
    for name, pairs in (("both", both), ("first", one), ("second", two)):
        conditioned.write(folder / f"{name}.safetensors", pairs, size=SIDE)
    def named(*names):
        return request("merge", folder, [replace(edges(folder), source=name) for name in names], loras=[])
    laws.same(laws.latents(engines["flux"], named("both", "both")), laws.latents(engines["flux"], named("first", "second")), 1e-12)
    with pytest.raises(Refused, match="holds 2 condition LoRAs"):
        engines["flux"].run(named("both", "both", "both"))


def test_the_result_says_what_it_was_read_with(engines, folder):
    result = engines["flux"].run(request("composite", folder, [edges(folder), edges(folder, strength=0.5)]))
    assert list(result.condition_receipts) == ["edges", "edges#2"] and result.condition_receipts["edges"].applied == 28
    assert result.seconds["conditions"] > 0 and result.notes["conditions"] == {"edges": "spatial, 16 tokens", "edges#2": "spatial, 16 tokens"}
    assert result.notes["conditions isolated"] is True
    assert "conditions isolated" not in engines["flux"].run(request("merge", folder, [edges(folder)])).notes
    listed = {control.name: control for control in engines["flux"].conditions()}
    assert listed["edges"].kind == "spatial" and listed["subject"].kind == "subject" and "style1" not in listed


def test_a_request_with_conditions_survives_json(folder):
    asked = request("merge", folder, [edges(folder, strength=0.5, start=0.2), subject(folder, kind="subject", weight=0.7)])
    assert Request.read(asked.json()) == asked
    assert Request.read('{"prompt": "a", "conditions": [{"source": "e", "image": "a.png", "kind": "edges", "weight": 1}]}').conditions[0].kind == "spatial"
    for wrong in ({"strength": -1}, {"strength": 11}, {"start": 0.5, "end": 0.5}, {"kind": "thing"}, {"strength": float("nan")}):
        with pytest.raises(ValueError, match=r"."):
            Condition("edges", "a.png", **wrong)
