"""Speed LoRAs are a part of the base: whatever a method does with the others, the picture is the one on a base that has them in its weights."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from app.remarks import remarks
from composition import Engine, Lora, Request, backbones, export
from composition.loras import reader, speed
from tests import toys
from tests.composition import laws
from tests.composition.loras import lora_writers as writers

SPEED_WEIGHT = 0.7


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Family -> a speed LoRA (by its name) and two of concepts."""
    folder, found = tmp_path_factory.mktemp("speed"), {}
    for family, make in (("sd", toys.sd), ("flux", toys.flux)):
        pipe = make(dtype=torch.float64)
        inside = folder / family
        inside.mkdir()
        found[family] = [toys.lora(pipe, inside / "lcm-lora.safetensors", seed=7, text=False, targets=("attn", "ff", "time"), dtype=torch.float64),
                         toys.lora(pipe, inside / "one.safetensors", seed=8, dtype=torch.float64),
                         toys.lora(pipe, inside / "two.safetensors", seed=9, rank=3, dtype=torch.float64)]
    return found


@pytest.fixture(scope="module")
def pairs(files):
    """Family -> an engine on a toy, and one on the same toy with the speed LoRA in its weights at SPEED_WEIGHT."""
    made = {}
    for family, make in (("sd", toys.sd), ("flux", toys.flux)):
        plain, dense = make(dtype=torch.float64), make(dtype=torch.float64)
        tensors, (_, model) = load_file(files[family][0]), toys.denoiser(dense)
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            down, up = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            layer = model.get_submodule(key.partition(".")[2].removesuffix(".lora_A.weight"))
            with torch.no_grad():
                layer.get_parameter("weight").add_(SPEED_WEIGHT * torch.einsum("or,r...->o...", up.flatten(1), down))
        made[family] = tuple(Engine(backbones.of(pipe, family), "toy") for pipe in (plain, dense))
    return made


def loras(files, family):
    fast, one, two = map(str, files[family])
    return (Lora(fast, weight=SPEED_WEIGHT), Lora(one, weight=0.8, binds="fox", region=(0.0, 0.0, 0.5, 1.0)),
            Lora(two, binds="owl", region=(0.5, 0.0, 1.0, 1.0)))


SOME = {"sd": ("merge", "switch", "composite", "cmlora", "clora", "clora-fast", "regions", "topk", "np-lora"), "flux": ("clora-fast", "regions", "topk")}


@pytest.mark.parametrize(("family", "method"), [(family, method) for family, names in SOME.items() for method in names])
def test_as_if_the_base_had_it(family, method, files, pairs):
    """Every step, row and place, the base's own rows and the negative one among them."""
    plain, dense = pairs[family]
    fast, *others = loras(files, family)
    found = laws.latents(plain, laws.request(method, others[0], fast, others[1], steps=2))
    laws.same(found, laws.latents(dense, laws.request(method, *others, steps=2)), 1e-8)
    laws.differ(found, laws.latents(plain, laws.request(method, *others, steps=2)))


def test_alone_it_is_merge(files, pairs):
    plain, dense = pairs["sd"]
    fast = loras(files, "sd")[0]
    for method in ("merge", "switch", "composite", "cmlora"):
        laws.same(laws.latents(plain, laws.request(method, fast)), laws.latents(dense, laws.request(method)), 1e-8)


def test_a_schedule_is_kept(files, pairs):
    """On in the first half alone, where the user says so."""
    plain, dense = pairs["sd"]
    fast, *others = loras(files, "sd")
    asked = laws.request("switch", replace(fast, end=0.5), *others)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, engine, request in (("asked", plain, asked), ("dense", dense, laws.request("switch", *others))):
        engine.run(request, on_step=lambda event, name=name: seen.setdefault(name, []).append(event.latents.clone()))
    half = laws.STEPS // 2
    laws.same(seen["asked"][half - 1], seen["dense"][half - 1], 1e-8)
    laws.differ(seen["asked"][half], seen["dense"][half])


def test_anchored_rows_have_it_too(files, pairs):
    plain, dense = pairs["sd"]
    fast, *others = loras(files, "sd")
    for method in ("merge", "composite"):
        laws.same(laws.latents(plain, laws.request(method, fast, *others, anchored=True, steps=2)),
                  laws.latents(dense, laws.request(method, *others, anchored=True, steps=2)), 1e-8)


def test_the_user_decides(files, pairs):
    """Another category makes it one of the others; "speed" makes any LoRA one that is always on. It is written into the request."""
    plain, dense = pairs["sd"]
    fast, *others = loras(files, "sd")
    settled, _ = plain.settle(laws.request("switch", fast, *others))
    assert [lora.category for lora in settled.loras] == ["speed", "", ""] and plain.settle(settled)[0] == settled
    assert Request.read(settled.json()) == settled
    as_other = laws.request("switch", replace(fast, category="other"), *others)
    assert plain.run(as_other).notes["leaders"][0] == "lcm-lora" and "always on" not in plain.run(as_other).notes
    result = plain.run(laws.request("switch", fast, *others, options={"tau": 1}))
    assert set(result.notes["leaders"]) == {"one", "two"} and result.notes["always on"] == ["lcm-lora"]
    assert any("always on" in line and "lcm-lora" in line for line in remarks(result.notes))
    turned = laws.request("switch", replace(fast, category="other", weight=0.0), replace(others[0], category="speed"), others[1])
    assert set(plain.run(turned).notes["leaders"]) == {"two"}
    placed = plain.run(laws.request("regions", replace(fast, region=(0.0, 0.0, 0.5, 1.0)), *others))
    assert "lcm-lora" in placed.notes["not read by this method"]


def test_nothing_is_left_and_groups_notice(files, pairs):
    plain, dense = pairs["sd"]
    fast, *others = loras(files, "sd")
    bare = laws.latents(plain, laws.request("merge"))
    with plain.group():
        for method in ("switch", "merge", "composite", "switch"):
            laws.same(laws.latents(plain, laws.request(method, fast, *others)), laws.latents(dense, laws.request(method, *others)), 1e-8)
    assert torch.equal(laws.latents(plain, laws.request("merge")), bare)
    assert all(module.__dict__["under"] is None for module in plain.backbone.denoiser.modules() if "under" in module.__dict__)


@pytest.mark.parametrize("method", ["merge", "depth"])
def test_an_exported_lora_has_it_in_it(method, files, pairs, tmp_path):
    plain, dense = pairs["sd"]
    fast, *others = (replace(lora, binds=None, region=None) for lora in loras(files, "sd"))
    file = tmp_path / "both.safetensors"
    export.export(plain, laws.request(method, fast, *others), file, dtype=torch.float64)
    assert reader.inspect(file).category == "other"  # whatever its title says
    laws.same(laws.latents(plain, laws.request("merge", Lora(str(file)))), laws.latents(dense, laws.request(method, *others)), 1e-6)


FAST = {"lcm-lora-sdxl/pytorch_lora_weights": "LCM", "LCM_LoRA_Weights_SD15": "LCM", "sdxl_lightning_4step_lora": "Lightning 4",
        "SDXL-Lightning_2steps": "Lightning 2", "Hyper-SDXL-8steps-lora": "Hyper 8", "Hyper-FLUX.1-dev-8steps-lora": "Hyper 8", "HyperSD15": "Hyper",
        "Hyper-SDXL-8steps-CFG-lora": "Hyper 8", "FLUX.1-Turbo-Alpha/diffusion_pytorch_model": "Turbo", "sd_xl_turbo_lora_v1": "Turbo",
        "TCD-SDXL-LoRA": "TCD", "dmd2_sdxl_4step_lora": "DMD2 4", "pcm_sdxl_normalcfg_8step_converted": "PCM 8"}
OTHERS = ("hyperrealism", "hyper_realistic_sdxl_style", "lightning_bolt_style", "thunder lightning sorceress", "racing turbo car", "hyperion", "owl",
          "sdxl_lightning_style", "lightning_lora", "turbo_lora", "hyper_light_drifter", "pcm_synth", "lightning_farron_sdxl")


def test_names_of_speed_loras(tmp_path):
    for name, said in FAST.items():
        found = speed.recognise(tmp_path / f"{name}.safetensors", {}, {"unet"})
        assert found and f"{found.kind.title} {found.steps}".strip() == said, name
        assert f"speed LoRA ({found.kind.title})" in found.advice() and f"{found.steps or '8' * found.flux or found.kind.steps} step" in found.advice()
        assert speed.recognise(tmp_path / "a.safetensors", {"ss_output_name": name.rpartition("/")[2]}, {""}) or "/" in name
    for name in OTHERS:
        assert speed.recognise(tmp_path / f"{name}.safetensors", {}, {"unet"}) is None, name
    for name, needs in (("Hyper-FLUX.1-dev-8steps-lora", "weight 0.125"), ("Hyper-SDXL-8steps-CFG-lora", "guidance 5 to 8")):
        found = speed.recognise(tmp_path / f"{name}.safetensors", {}, {"unet"})
        assert found and needs in found.advice()


def test_what_speaks_against_it(tmp_path, files):
    """A part of a text encoder, trigger words, a header that says another category."""
    path = tmp_path / "lcm-lora.safetensors"
    assert speed.recognise(path, {}, {"unet", "text_encoder"}) is None
    assert speed.recognise(path, {"trigger_words": "lcmgirl"}, {"unet"}) is None
    assert speed.recognise(path, {"category": "style"}, {"unet"}) is None
    assert speed.is_one(files["sd"][0]) and not speed.is_one(files["sd"][1]) and not speed.is_one(path)
    made = [one for one in writers.updates(toys.sd(), only="attn1") if one.component == "unet"]
    tensors, _ = writers.WRITERS["kohya"](toys.sd(), made)
    said = writers.save(tmp_path / "owl.safetensors", (tensors, {"category": "speed"}))
    assert speed.is_one(said) and reader.describe(said).category == "speed"


def test_the_receipt_advises(files):
    receipt = reader.inspect(files["sd"][0])
    assert receipt.category == "speed" and "4 to 8 steps, sampler lcm, guidance 1 to 2" in receipt.line()
    assert reader.inspect(files["sd"][1]).category == ""
