"""Control LoRAs on a toy of FLUX in float64: the stock control pipeline's pictures, both layouts, strength 0, times, what is refused."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxControlPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file

from composition import Condition, Engine, Refused
from composition.hooks import control_lora as hooks
from composition.loras import control_lora
from tests import reference, toys
from tests.composition import laws
from tests.composition.conftest import FAMILIES

SIDE = 16  # of the pictures of laws


@pytest.fixture(autouse=True)
def quick(shapes_unchecked):
    """Shapes are checked where each part is tested."""


@pytest.fixture(scope="module", params=["flux", "flux-dev"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, engines):
    folder = tmp_path_factory.mktemp("control-loras")
    pipe = engines["flux"].backbone.pipeline
    for layout in ("diffusers", "bfl"):
        toys.control_lora(pipe, folder / f"{layout}.safetensors", layout)
    Image.effect_noise((SIDE, SIDE), 90).convert("RGB").save(folder / "edges.png")
    return folder


@pytest.fixture
def engine(engines, family, folder):
    return Engine(engines[family].backbone, "toy", folders=[folder])


@pytest.fixture
def edges(folder):
    return Condition("bfl", str(folder / "edges.png"), annotator="")


def test_merge_is_the_stock_control_pipeline(family, engine, edges, folder, monkeypatch):
    """In both layouts. (The stock pipeline draws the picture's latents; here it takes their mean.)"""
    asked = laws.request("merge", conditions=[edges], steps=4, guidance=3.5 if family == "flux-dev" else 1.0)
    mine = laws.latents(engine, asked)
    assert torch.equal(laws.latents(engine, replace(asked, conditions=[replace(edges, source="diffusers")])), mine)
    laws.differ(mine, laws.latents(engine, replace(asked, conditions=[])))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    parts = FAMILIES[family](dtype=torch.float64).components
    pipe = FluxControlPipeline(**{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")})
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder / "diffusers.safetensors")
    stock = pipe(asked.prompt, control_image=Image.open(folder / "edges.png"), height=SIDE, width=SIDE, num_inference_steps=4, guidance_scale=3.5,
                 generator=torch.Generator().manual_seed(asked.seed), output_type="latent",
                 max_sequence_length=pipe.tokenizer_2.model_max_length).images  # fmt: skip
    laws.same(mine, reference.unpacked(stock, pipe, SIDE))


def test_strength_and_times(engine, edges):
    asked = laws.request("merge", steps=2)
    plain, whole = (laws.latents(engine, replace(asked, conditions=some)) for some in ([], [edges]))
    assert torch.equal(laws.latents(engine, replace(asked, conditions=[replace(edges, strength=0.0)])), plain)
    half, early = (laws.latents(engine, replace(asked, conditions=[some])) for some in (replace(edges, strength=0.5), replace(edges, end=0.5)))
    for other in (half, early):
        laws.differ(other, plain)
        laws.differ(other, whole)


@pytest.mark.parametrize("method", ["cmlora", "regions"])
def test_rows_of_every_kind(engines, folder, edges, method, lora_files):
    """With LoRAs beside it, in every row: at once or one by one, two pictures in one batch or by themselves."""
    engine, loras = Engine(engines["flux"].backbone, "toy", folders=[folder]), laws.loras_of(lora_files["flux"])[:2]
    loras = [replace(loras[0], region=(0.0, 0.0, 0.5, 1.0)), loras[1]]
    asked = laws.request(method, *loras, steps=2, count=2, conditions=[edges])
    singles = laws.latents(engine, asked)
    laws.same(laws.latents(engine, replace(asked, batched=False)), singles)
    engine.together = 2
    laws.same(laws.latents(engine, asked), singles)


def test_beside_a_condition_lora(engines, folder, edges, tmp_path):
    engine = Engine(engines["flux"].backbone, "toy", folders=[folder])
    source = toys.condition(engine.backbone.denoiser, tmp_path / "subject.safetensors", size=16)
    banked = Condition(str(source), edges.image, annotator="")
    one, other, both = (laws.latents(engine, laws.request("merge", steps=2, conditions=some)) for some in ([edges], [banked], [banked, edges]))
    laws.differ(both, one)
    laws.differ(both, other)
    laws.same(laws.latents(engine, laws.request("merge", steps=2, conditions=[edges, banked])), both)
    result = engine.run(laws.request("merge", steps=1, conditions=[banked, edges]))
    assert {name: receipt.layout for name, receipt in result.condition_receipts.items()} == {"subject": "easycontrol", "bfl": "control-lora"}


def test_everything_is_returned(engine, edges, monkeypatch):
    before = laws.fingerprint(engine)
    engine.run(laws.request("merge", steps=1, conditions=[edges]))
    assert laws.fingerprint(engine) == before

    def fail(event):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        engine.run(laws.request("merge", steps=2, conditions=[edges]), on_step=fail)
    assert laws.fingerprint(engine) == before
    lora = control_lora.read(engine.find_condition("bfl"), engine.backbone.denoiser)
    left = hooks.controlled(engine.backbone.denoiser, lora, torch.zeros(1, SIDE * SIDE // 16, 16, dtype=torch.float64))
    left.__enter__()
    hooks.abandon(engine.backbone.denoiser)
    assert laws.fingerprint(engine) == before
    with pytest.raises(RuntimeError, match="ran without it"):
        left.__exit__(None, None, None)


def test_what_does_not_fit_is_refused(engine, engines, edges, folder, tmp_path):
    pipe, whole = engine.backbone.pipeline, load_file(folder / "bfl.safetensors")

    def refused(tensors, words):
        save_file(tensors, tmp_path / "thing.safetensors")
        with pytest.raises(Refused, match=words):
            engine.run(laws.request("merge", conditions=[replace(edges, source=str(tmp_path / "thing.safetensors"))]))

    toys.control_lora(pipe, tmp_path / "fill.safetensors", "bfl", inputs=6)
    refused(load_file(tmp_path / "fill.safetensors"), "80 numbers a token beside the 16 of the latents.*as for filling in")
    refused(whole | {"img_in.lora_B.weight": torch.zeros(64, 4)}, "made for a model of another width")
    refused(whole | {"double_blocks.7.img_attn.proj.lora_A.weight": torch.zeros(4, 32)}, "'double_blocks.7.img_attn.proj' is a layer that this model")
    refused(whole | {"something": torch.zeros(1)}, "'something' is in no control LoRA")
    refused(whole | {"single_blocks.0.norm.key_norm.scale": torch.zeros(5)}, r"does not take weights of shape \(5,\)")
    refused({name: tensor for name, tensor in whole.items() if name != "img_in.lora_B.weight"}, "incomplete pair")
    refused({name: tensor for name, tensor in whole.items() if not name.startswith("img_in.lora_B")}, "incomplete pair")
    refused({"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}, "is a ControlNet for Stable Diffusion")
    refused({"lllite_unet.down.0.weight": torch.zeros(1)}, "LLLite")
    with pytest.raises(Refused, match="a control LoRA has a strength"):
        engine.run(laws.request("merge", conditions=[replace(edges, weight=0.5)]))
    with pytest.raises(Refused, match="FLUX takes one"):
        engine.run(laws.request("merge", conditions=[edges, replace(edges, source="diffusers")]))


def test_mutant_that_reads_no_picture_is_caught(engines, folder, edges, monkeypatch):
    engine = Engine(engines["flux"].backbone, "toy", folders=[folder])
    other = replace(edges, image=str(folder / "other.png"))
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(folder / "other.png")
    pair = [laws.request("merge", steps=1, conditions=[some]) for some in (edges, other)]
    laws.differ(*(laws.latents(engine, asked) for asked in pair))
    honest = hooks.controlled
    monkeypatch.setattr("composition.control_loras.controlled", lambda model, lora, tokens, strength: honest(model, lora, tokens * 0, strength))
    with pytest.raises(AssertionError):
        laws.differ(*(laws.latents(engine, asked) for asked in pair))
