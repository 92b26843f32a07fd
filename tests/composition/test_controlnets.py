"""Conditions that ControlNets read, from the request on: by name and path, times, strength, records; on toys in float64."""

from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from PIL import Image

from composition import Condition, Engine, Refused
from composition.loras import controls
from tests import toys
from tests.composition import laws
from tests.composition.conftest import FAMILIES

SIDE = 16  # of the pictures of laws
PIPES = {"sd": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}


@pytest.fixture(autouse=True)
def quick(shapes_unchecked):
    """Shapes are checked where each part is tested."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, engines):
    """Two ControlNets of each family, "controlnet-edges" a folder and "depth" a file, and the pictures they read."""
    folder = tmp_path_factory.mktemp("controls")
    for family in PIPES:
        pipe = engines[family].backbone.pipeline
        toys.controlnet(pipe, 1).save_pretrained(folder / family / "controlnet-edges")
        toys.write_controlnet(toys.controlnet(pipe, 2), folder / family / "deeper/depth.safetensors", {"condition.annotator": "grey"})
    Image.effect_noise((SIDE, SIDE), 90).convert("RGB").save(folder / "edges.png")
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(folder / "depth.png")
    return folder


@pytest.fixture(params=["sd", "sdxl"])
def family(request):
    return request.param


@pytest.fixture
def engine(family, engines, folder):
    return Engine(engines[family].backbone, "toy", folders=[folder / family])


@pytest.fixture
def edges(folder):
    return Condition("edges", str(folder / "edges.png"), annotator="", strength=0.8)


@pytest.fixture
def depth(folder):
    return Condition("depth", str(folder / "depth.png"), annotator="", strength=0.6)


def test_merge_is_the_stock_pipeline_with_times_of_its_own(family, engine, edges, depth, folder):
    asked = laws.request("merge", conditions=[replace(edges, end=0.5), replace(depth, start=0.25)], steps=4, sampler="euler", negative="the owl")
    result = engine.run(asked)
    pipe = PIPES[family](**FAMILIES[family](dtype=torch.float64).components, controlnet=[toys.controlnet(engine.backbone.pipeline, seed) for seed in (1, 2)])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(engine.backbone.scheduler.config)
    given = {"image": [Image.open(folder / name) for name in ("edges.png", "depth.png")], "controlnet_conditioning_scale": [0.8, 0.6],
             "control_guidance_start": [0.0, 0.25], "control_guidance_end": [0.5, 1.0]}
    stock = pipe(asked.prompt, negative_prompt=asked.negative, width=SIDE, height=SIDE, num_inference_steps=4, guidance_scale=4.0,
                 generator=torch.Generator().manual_seed(asked.seed), output_type="latent", **given).images
    laws.same(laws.latents(engine, asked), stock)
    assert {name: receipt.layout for name, receipt in result.condition_receipts.items()} == {"edges": "controlnet", "depth": "controlnet"}
    assert all(receipt.applied == receipt.tensors > 0 and len(receipt.sha256) == 64 for receipt in result.condition_receipts.values())


def test_strength_0_is_nothing_bit_for_bit(engine, edges):
    asked = laws.request("merge", steps=2)
    plain = laws.latents(engine, asked)
    assert torch.equal(laws.latents(engine, replace(asked, conditions=[replace(edges, strength=0.0)])), plain)
    laws.differ(laws.latents(engine, replace(asked, conditions=[edges])), plain)


def test_several_may_be_one_net_with_other_pictures(engine, edges, folder):
    """Each reads its own picture; in whichever order they are."""
    other = replace(edges, image=str(folder / "depth.png"))
    one, pair, turned = (laws.latents(engine, laws.request("merge", conditions=some, steps=2)) for some in ([edges], [edges, other], [other, edges]))
    laws.differ(pair, one)
    laws.same(turned, pair)


@pytest.mark.parametrize("method", ["clora-fast", "regions"])
def test_a_region_that_is_everywhere(family, engine, method, edges, lora_files):
    """The run says where each segment of a regional prompt is read."""
    honest = laws.request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laws, "request", lambda *args, **changes: honest(*args, **changes, conditions=[edges]))
        laws.own_place(engine, method, laws.loras_of(lora_files[family]))


def test_an_annotator_by_the_file_and_by_the_request(engine, folder, depth, edges):
    assert [(control.name, control.annotator, control.sort, control.bundled) for control in engine.conditions()] == [
        ("edges", "", "ControlNet", False), ("depth", "grey", "ControlNet", False)]
    grey = replace(depth, annotator="grey", image=str(folder / "edges.png"))
    asked = laws.request("merge", steps=2)
    by_file, by_request, drawn = (laws.latents(engine, replace(asked, conditions=[replace(grey, annotator=annotator)])) for annotator in (None, "grey", ""))
    assert torch.equal(by_file, by_request)
    assert by_file.shape == drawn.shape


def test_everything_is_returned(engine, edges):
    before = laws.fingerprint(engine)
    asked = laws.request("merge", steps=1, conditions=[edges])
    engine.run(asked)
    assert laws.fingerprint(engine) == before

    def fail(event):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        engine.run(asked, on_step=fail)
    assert laws.fingerprint(engine) == before


def test_the_last_requests_nets_are_kept(engine, edges, depth, monkeypatch):
    from composition import controlnets

    opened, honest = [], controlnets.open
    monkeypatch.setattr(controlnets, "open", lambda path, backbone: opened.append(path.name) or honest(path, backbone))
    for conditions in ([edges, depth], [edges], [edges], [depth], []):
        engine.run(laws.request("merge", steps=1, conditions=conditions))
    assert opened == ["controlnet-edges", "depth.safetensors", "depth.safetensors"]
    assert not engine._controls._held


def test_what_is_not_a_controlnets_is_refused(engine, engines, edges, depth, lora_files, family):
    def refused(condition, words):
        with pytest.raises(Refused, match=words):
            engine.run(laws.request("merge", steps=1, conditions=[condition]))

    refused(replace(edges, source="edgse"), "did you mean 'edges'")
    refused(replace(edges, source=str(lora_files[family][0])), "is no ControlNet")
    refused(replace(edges, weight=0.5), "a ControlNet has a strength")
    refused(replace(edges, kind="subject"), "lies over the whole one")
    with pytest.raises(Refused, match="ControlNets need Stable Diffusion or SDXL"):
        engines["sd3"].run(laws.request("merge", conditions=[edges]))


def test_names(folder, tmp_path):
    place = folder / "sd"
    assert controls.find("edges", [place]) == controls.find("controlnet-edges", [place]) == place / "controlnet-edges"
    assert controls.find("depth.safetensors", [place]) == controls.find("depth", [place]) == place / "deeper/depth.safetensors"
    assert controls.find(str(place / "controlnet-edges"), []) == place / "controlnet-edges"
    (tmp_path / "depth.safetensors").write_bytes((place / "deeper/depth.safetensors").read_bytes())
    with pytest.raises(Refused, match="2 ControlNets are named 'depth'"):
        controls.find("depth", [place, tmp_path])
    with pytest.raises(Refused, match="there are none"):
        controls.find("depth", [tmp_path / "nothing"])
