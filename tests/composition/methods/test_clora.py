"""CLoRA, CLoRA fast and Regions on toys of both families in float64, and on Pocket: the tests T1 to T12 of the specification.

T1 (no LoRA is the stock pipeline), T9 (everything given back after exception and cancel) and T12 (a CPU is enough) are laws of every
method in test_laws.py; T4, T10 and T11 are in test_contrast.py and test_masks.py.
"""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from composition import Engine, Lora, Refused
from composition.hooks import masks
from composition.loop import Step
from composition.methods import clora, clora_fast
from composition.methods.shared import concepts
from composition.run import Run
from tests import reference, toys
from tests.composition import laws
from tests.composition.conftest import FAMILIES, SHAPED

WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(params=["sd", "sdxl", "flux"])
def case(request, engines, lora_files):
    if request.param not in SHAPED:
        request.getfixturevalue("shapes_unchecked")
    return engines[request.param], laws.loras_of(lora_files[request.param])


def asked(method, loras, options=None, **changes):
    return laws.request(method, *loras, options=options or {}, **{"sampler": "euler", **changes})


def inside(engine, loras, body, **changes):
    """Calls body(run, step) in a session of these LoRAs."""
    from composition.backbones import schedulers

    request = asked("clora", loras, **changes)
    found = [(name, lora, engine.find(lora.source)) for name, lora in zip(request.names, request.loras, strict=True)]
    scheduler = schedulers.make(request.sampler, engine.backbone.scheduler, request.steps)
    with engine.adapters.session(found), torch.no_grad():
        run = Run(engine.backbone, engine.adapters, request, scheduler, [torch.Generator().manual_seed(seed) for seed in request.seeds])
        latents, times = engine.backbone.start(request, scheduler, run.generators)
        return body(run, Step(0, request.steps, times[0], latents))


@pytest.mark.parametrize("method, options", [("clora", {}), ("clora-fast", {}), ("regions", {})])
def test_2_one_lora_whose_place_is_everywhere_is_that_lora(case, method, options):
    engine, loras = case
    for lora in loras[:2]:
        whole = replace(lora, region=WHOLE)
        laws.same(laws.latents(engine, asked(method, [whole], options)), laws.latents(engine, asked("merge", [lora])))


def test_3_without_places_and_moves_it_is_composite_with_the_base(case, lora_files):
    """Mean of N + 1 predictions, on stock diffusers and PEFT."""
    engine, loras = case
    family, weights = engine.family, [lora.weight for lora in loras]
    pipe = FAMILIES[family](dtype=torch.float64)
    from composition.backbones import schedulers

    pipe.scheduler = schedulers.make("euler", pipe.scheduler, laws.STEPS)
    names = reference.load(pipe, lora_files[family], weights)
    request = asked("clora", loras, {"update": False, "masks_from": 1.0})
    pipe.disable_lora()
    bare = reference._encode(pipe, request.prompt, "")
    pipe.enable_lora()

    def combine(index, predictor):
        total = sum(predictor(k) for k in range(len(names)))
        pipe.disable_lora()
        latents, t = predictor.__defaults__
        total = total + reference._predict(pipe, latents, t, bare, request.guidance)
        pipe.enable_lora()
        return total / (len(names) + 1)

    expected = reference.each(pipe, names, weights, request.prompt, "", request.steps, request.guidance,
                              torch.Generator().manual_seed(request.seed), combine, laws.SIDE)
    laws.same(laws.latents(engine, request), expected, 1e-7)


@pytest.mark.parametrize("sampler", ["default", "euler"])
@pytest.mark.parametrize("reference_code", [False, True])
def test_5_pass_by_pass_the_gradient_is_that_of_the_whole(case, reference_code, sampler):
    engine, loras = case

    def body(run, step):
        found = []
        for two_phase in (True, False):
            course = clora._Course(run, clora.Options(two_phase=two_phase, reference=reference_code))
            passes = concepts.passes_of(run, course.scene, run.live(step), [0, 1, 2])
            kinds = course._kinds([0, 1, 2])
            maps = run.attention_maps(step, passes, course.layers, "all" if reference_code else "positive")
            found.append(course._gradient(step, passes, [0, 1, 2], kinds, maps))
        laws.same(found[0][0], found[1][0], 1e-9)
        assert torch.allclose(found[0][1], found[1][1]) and found[0][0].abs().max() > 0
        # and of the loss, by differences
        # (a wider step for FLUX, whose rotary embedding is computed in single precision whatever the model's is)
        wide = 1e-3 if engine.backbone.joint else 1e-5
        step_to = torch.randn(step.latents.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * wide

        def loss(latents):
            return float(course._loss(run.attention_maps(step._replace(latents=latents), passes, course.layers,
                                                 "all" if reference_code else "positive"), [0, 1, 2], kinds).sum())

        slope = (loss(step.latents + step_to) - loss(step.latents - step_to)) / 2
        assert slope == pytest.approx(float((found[0][0] * step_to).sum()), rel=1e-2 if engine.backbone.joint else 1e-4)

    inside(engine, loras, body, sampler=sampler, count=2)


@pytest.mark.parametrize("sampler", ["default", "euler"])
def test_a_move_lowers_the_loss_in_every_samplers_scale(case, sampler):
    """Euler's latents are many times larger than what the denoiser reads: the move is made in the latter's scale."""
    engine, loras = case

    def body(run, step):
        course = clora._Course(run, clora.Options())
        passes = concepts.passes_of(run, course.scene, run.live(step), [0, 1, 2])
        kinds, losses = course._kinds([0, 1, 2]), []
        for _ in range(4):
            maps = run.attention_maps(step, passes, course.layers)
            gradient, loss = course._gradient(step, passes, [0, 1, 2], kinds, maps)
            losses.append(float(loss.mean()))
            move = course._update(step, gradient)
            assert float(move.norm() / step.latents.norm()) <= 0.1 + 1e-9
            step = step._replace(latents=step.latents - move)
        assert losses[-1] < losses[0]

    inside(engine, loras, body, sampler=sampler)


def test_moves_are_made_early_and_refined_and_stop_when_the_loss_is_low(case):
    engine, loras = case
    told = engine.run(asked("clora", loras, {"stop": 0.0, "until": 0.5, "rounds": 2, "refine": "0,0.5"}, steps=8)).notes["clora"]
    assert [len(losses) for losses in told["loss"]] == [3, 1, 1, 1]  # half of 8 steps, refined at 0 (and at 4, which is not early)
    told = engine.run(asked("clora", loras, {"stop": 1.0, "until": 0.5}, steps=8)).notes["clora"]
    assert [len(losses) for losses in told["loss"]] == [1, 1, 1, 1]
    course = inside(engine, loras, lambda run, step: clora._Course(run, clora.Options()))  # as the paper has it, or FLUX needs it
    assert (course.until, course.rounds, course.refined) == ((0, 5, [0, 0.07]) if engine.backbone.joint else (0.5, 20, [0, 0.2, 0.4]))
    course = inside(engine, loras, lambda run, step: clora._Course(run, clora.Options(until=0.0, rounds=0, refine="")))
    assert (course.until, course.rounds, course.refined) == (0, 0, [])
    assert engine.run(asked("clora", loras, {"update": False})).notes["clora"]["loss"] == []
    with pytest.raises(Refused, match="refine"):
        engine.run(asked("clora", loras, {"refine": "0,two"}))


def test_reference_does_what_the_released_code_does(case):
    """No early stop, all rounds; both guidance rows in the maps; a constant step of 20."""
    engine, loras = case
    told = engine.run(asked("clora", loras, {"reference": True, "until": 0.5, "rounds": 2}, steps=5, negative="an owl")).notes["clora"]
    assert [len(losses) for losses in told["loss"]] == ([3, 1, 1] if engine.backbone.joint else [3, 3, 3]) and told["maps"] == "attention"
    own = engine.run(asked("clora", loras, {"stop": 0.0, "until": 0.5, "rounds": 2}, steps=5, negative="an owl")).notes["clora"]
    assert own["loss"][0][0] != told["loss"][0][0]


@pytest.mark.parametrize("method", ["clora", "clora-fast"])
def test_7_not_square(case, method):
    """Maps and masks have the picture's shape, and a region on the left stays on the left."""
    engine, loras = case
    options = laws.LIGHT.get(method, {})
    wide = engine.run(asked(method, loras[:2], options, size=(24, 16)))
    told = next(iter(wide.notes["masks"].values()))
    assert len(told["map"][0]) == 3 * len(told["map"]) // 2 and len(told["mask"][0]) == len(told["map"][0])
    assert wide.images[0].size == (24, 16)
    left = [replace(loras[0], region=(0.0, 0.0, 0.5, 1.0)), loras[1]]
    mask = engine.run(asked(method, left, options, size=(24, 16))).notes["masks"][left[0].name]["mask"]
    assert all(row == [255] * (len(row) // 2) + [0] * (len(row) // 2) for row in mask)


def placed_values(step, shape=(8, 16)):
    """Values (3, 1, 1, C, *shape) in which the first LoRA changes a spot on the left most, and the second one on the right."""
    values = torch.zeros(3, 1, 1, step.latents.shape[1], *shape, dtype=torch.float64)
    values[1, ..., 2:6, 1:5], values[2, ..., 2:6, 11:15] = 2.0, -0.3
    return values


@pytest.mark.parametrize("maps", ["change", "auto"])
def test_by_change_a_place_is_the_loras_that_changes_it_most(case, maps):
    """Whatever their strengths; where neither changes much it is the base's; a region replaces or cuts, and the other gets the rest."""
    engine, loras = case

    def body(run, step):
        options = clora.Options(maps=maps, smooth=0.0)
        wide = step._replace(latents=step.latents.new_zeros(1, step.latents.shape[1], 8, 16))
        level = engine.backbone.prompt_attention()[engine.backbone.localizing_layers()[0]]
        names = list(run.names[:2])
        values = placed_values(step)
        places, strength = concepts.masks_from_change(run, wide, values, options, names)
        assert places.shape == (1, 2, -(-8 // 2**level), -(-16 // 2**level)) and places.sum(1).max() == 1
        across = torch.arange(places.shape[-1], dtype=torch.float64)
        centre = (places.sum(-2) * across).sum(-1) / places.sum((-2, -1))
        assert centre[0, 0] < across.mean() - 1 < across.mean() + 1 < centre[0, 1]
        assert float(strength.amax()) == pytest.approx(1, abs=1e-3) and places.sum() < places[0, 0].numel()

    inside(engine, loras, body)
    told = engine.run(asked("clora", loras[:2], {"update": False, "maps": maps})).notes["clora"]["maps"]
    assert told == ("change" if maps == "change" or engine.backbone.joint else "attention")


@pytest.mark.parametrize("method, options", [("clora-fast", {"ask": "change"}), ("clora", {"maps": "change", "update": False})])
@pytest.mark.parametrize("regions", ["replace", "intersect"])
def test_by_change_with_a_region_the_other_contends_for_the_rest(case, regions, method, options):
    engine, loras = case
    halves = [replace(loras[0], region=(0.5, 0.0, 1.0, 1.0)), loras[1]]
    names = asked(method, halves).names
    told = engine.run(asked(method, halves, {**options, "regions": regions, "threshold": 0.0, "closing": False})).notes["masks"]
    first, second = (torch.tensor(told[name]["mask"]).float() / 255 for name in names)
    middle = first.shape[1] // 2
    assert first[:, :middle].eq(0).all() and float((first * second).max()) == 0
    if regions == "replace":
        assert first[:, middle:].eq(1).all() and second[:, :middle].eq(0).sum() <= 1  # all but the place of its least change
    else:
        assert 0 < first[:, middle:].mean() < 1


def test_by_change_the_fast_one_reads_thrice_and_is_clora_there(case):
    """Three steps, all of them readings: CLoRA without moves. Seven: three of them cost the base and every LoRA, four one evaluation."""
    engine, loras = case
    same = {"overlap": "argmax", "threshold": 0.2}
    fast = laws.latents(engine, asked("clora-fast", loras, {"ask": "change", "read": 1.0, **same}, steps=3))
    laws.same(fast, laws.latents(engine, asked("clora", loras, {"maps": "change", "update": False, **same}, steps=3)))
    notes = engine.run(asked("clora-fast", loras, {"ask": "change", "read": 0.4}, steps=7)).notes
    assert notes["evaluations"] == 3 * (len(loras) + 1) + 4
    assert clora_fast.readings(0.3, 25) == {0, 3, 7} and clora_fast.readings(0.0, 25) == {0} and clora_fast.readings(0.3, 4) == {0, 1}
    assert clora_fast.readings(1.0, 28) == {0, 13, 27}


def test_8_a_lora_of_the_denoiser_alone(engines, tmp_path):
    pipe = toys.sd(dtype=torch.float64)
    files = [toys.lora(pipe, tmp_path / f"{seed}.safetensors", seed=seed, text=False) for seed in (5, 6)]
    loras = [Lora(str(file), binds=words) for file, words in zip(files, ("the fox", "the owl"), strict=True)]
    for method in ("clora", "clora-fast"):
        laws.differ(laws.latents(engines["sd"], asked(method, loras, laws.LIGHT.get(method, {}))), laws.latents(engines["sd"], asked("merge", loras)))


def test_masks_of_users_replace_or_cut(case, tmp_path):
    engine, loras = case
    Image.new("L", (40, 40), 255).save(tmp_path / "all.png")
    own = [replace(loras[0], region=str(tmp_path / "all.png")), loras[1]]
    name = asked("clora", own).names[0]
    light = {"update": False, "threshold": 0.999}
    replaced = engine.run(asked("clora", own, light)).notes["masks"][name]["mask"]
    assert all(value == 255 for row in replaced for value in row)
    free = engine.run(asked("clora", loras[:2], light, steps=1)).notes["masks"][name]["mask"]
    cut = engine.run(asked("clora", own, {**light, "regions": "intersect"}, steps=1)).notes["masks"][name]["mask"]
    assert cut == free and any(value == 0 for row in free for value in row)
    with pytest.raises(Refused, match="no picture"):
        engine.run(asked("clora", [replace(own[0], region=str(tmp_path / "none.png")), loras[1]], light))


def test_a_lora_that_belongs_everywhere_is_on_in_every_pass(case):
    """A style: with it and one concept, the base's share has the style too."""
    engine, loras = case
    style = replace(loras[2], binds=None, category="style")
    nowhere = replace(loras[0], region=(0.0, 0.0, 0.01, 0.01))
    for method in ("clora", "clora-fast", "regions"):
        near = laws.latents(engine, asked(method, [replace(nowhere, weight=1e-12), style], laws.LIGHT.get(method, {})))
        # In joint attention the words of the concept see the picture too, and tell what little they see.
        laws.same(near, laws.latents(engine, asked("merge", [style])), 1e-4 if engine.backbone.joint else 1e-6)


def test_regions_without_any_is_merge_and_with_two_is_two_places(case):
    engine, loras = case
    laws.same(laws.latents(engine, asked("regions", loras)), laws.latents(engine, asked("merge", loras)))
    halves = [replace(loras[0], region=(0.0, 0.0, 0.5, 1.0)), replace(loras[1], region=(0.5, 0.0, 1.0, 1.0))]
    result = engine.run(asked("regions", halves))
    assert engine.run(asked("regions", loras)).notes["no regions"] and "no regions" not in result.notes
    assert result.notes["evaluations"] == laws.STEPS and set(result.notes["masks"]) == set(asked("regions", halves).names)
    swapped = [replace(halves[0], region=halves[1].region), replace(halves[1], region=halves[0].region)]
    laws.differ(laws.latents(engine, asked("regions", halves)), laws.latents(engine, asked("regions", swapped)))


def test_a_region_without_words_is_refused_where_maps_are_needed_and_taken_where_not(case):
    engine, loras = case
    lost = [replace(loras[0], binds=None, category="style", region=(0.0, 0.0, 0.5, 1.0)), loras[1]]
    for method in ("clora", "clora-fast"):
        with pytest.raises(Refused, match="no words of it"):
            engine.run(asked(method, lost))
    assert set(engine.run(asked("regions", lost)).notes["masks"]) == {asked("regions", lost).names[0]}


def test_what_no_method_reads_is_noted_and_what_is_read_is_not(case):
    engine, loras = case
    bound = [replace(loras[0], region=WHOLE), loras[1]]
    assert set(engine.run(asked("merge", bound)).notes["not read by this method"]) == set(asked("merge", bound).names)
    assert "not read by this method" not in engine.run(asked("clora-fast", bound)).notes


def test_a_lora_of_layers_without_a_place_is_named(engines, tmp_path):
    """Time embeddings have no place: such a LoRA acts everywhere, and the notes say so."""
    file = toys.lora(toys.sd(dtype=torch.float64), tmp_path / "time.safetensors", seed=4, targets=("attn", "time"), text=False)
    plain = toys.lora(toys.sd(dtype=torch.float64), tmp_path / "plain.safetensors", seed=5, targets=("attn",), text=False)
    bound = [Lora(str(file), binds="the fox"), Lora(str(plain), binds="the owl")]
    assert engines["sd"].run(asked("clora-fast", bound, steps=2)).notes["acts everywhere in part"] == ["time"]
    assert "acts everywhere in part" not in engines["sd"].run(asked("clora-fast", bound[1:], steps=2)).notes
    assert "acts everywhere in part" not in engines["sd"].run(asked("merge", bound, steps=2)).notes


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clora", "clora-fast"])
def test_on_pocket_two_animals_have_places_of_their_own(method):
    """Word order is place in Pocket's world: the first stands on the left; the maps must know it, and the masks part."""
    with Engine.open("pocket", device="cpu") as engine:
        loras = [Lora("raccoon"), Lora("owl"), Lora("ink", 0.25)]
        asking = {"prompt": "a raccoon and an owl in the snow, ink drawing", "seed": 3, "guidance": 4.5, "size": None}
        result = engine.run(asked(method, loras, {"rounds": 4} if method == "clora" else {}, steps=8, **asking))
    found = {name: torch.tensor(told["mask"]).float() / 255 for name, told in result.notes["masks"].items()}
    assert set(found) == {"raccoon", "owl"} and result.notes["clora"]["everywhere"] == ["ink"]
    across = {name: float((mask.sum(0) * torch.arange(mask.shape[1])).sum() / mask.sum()) for name, mask in found.items()}
    assert across["raccoon"] + 1 < across["owl"]
    assert float((found["raccoon"] * found["owl"]).sum()) < 0.25 * min(float(mask.sum()) for mask in found.values())
    assert masks.shares(torch.stack(list(found.values()))[None]).sum(1).allclose(torch.ones(1, *found["owl"].shape))
