"""What is FLUX's and SD3's own: guidance in three kinds, what is usual, prompts read no more often than needed, sizes, no T5."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from composition import Engine, Lora, Refused, Request, backbones
from composition.backbones.flux import packed, unpacked
from tests import reference, toys
from tests.composition import laws

PROMPT = "the fox and the owl on the moon"


def fast(dtype=torch.float64):
    """A toy of schnell's kind: no guidance embedding, sigmas that are not shifted."""
    pipe = toys.flux(dtype=dtype)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipe


def engine(pipe):
    return Engine(backbones.of(pipe, "sd3" if hasattr(pipe, "text_encoder_3") else "flux"), "toy")


def asked(**changes):
    return Request(PROMPT, **({"seed": 3, "steps": 4} | changes))


def test_what_is_usual_is_the_models_own():
    for pipe, usual in ((toys.flux_distilled(), (28, 3.5)), (fast(torch.float32), (4, 1.0)), (toys.flux(), (25, 4.5)), (toys.sd3(), (28, 4.5))):
        made = engine(pipe)
        assert tuple(made.backbone.defaults) == usual
        result = made.run(Request(PROMPT, steps=2))
        assert (result.request.steps, result.request.guidance) == (2, usual[1])
    assert engine(fast(torch.float32)).run(Request(PROMPT)).request.steps == 4


def test_a_request_that_leaves_its_steps_open_has_no_length():
    with pytest.raises(RuntimeError, match="settle"):
        _ = Request(PROMPT).length
    assert Request(PROMPT).settled(7, 2.0).length == 7 and Request(PROMPT, steps=3).settled(7, 2.0).length == 3


def test_schnell_is_asked_once_a_step_and_is_the_stock_pipeline():
    made = engine(fast())
    found = laws.latents(made, asked())
    out = fast()(PROMPT, num_inference_steps=4, generator=torch.Generator().manual_seed(3), height=32, width=32, output_type="latent",
                 max_sequence_length=toys.T5_TOKENS).images
    laws.same(packed(found), out, 1e-12)
    assert made.backbone.encode([PROMPT], None).rows == 1


def test_true_guidance_beside_the_models_own():
    """FLUX.1-dev's guidance is a number it reads; over 1, true_guidance adds the negative row, as true_cfg_scale does."""
    made = engine(toys.flux_distilled(dtype=torch.float64))
    found = laws.latents(made, asked(negative="an owl", true_guidance=3.0, guidance=2.5))
    out = toys.flux_distilled(dtype=torch.float64)(
        PROMPT, negative_prompt="an owl", true_cfg_scale=3.0, guidance_scale=2.5, num_inference_steps=4, height=32, width=32,
        generator=torch.Generator().manual_seed(3), output_type="latent", max_sequence_length=toys.T5_TOKENS).images
    laws.same(packed(found), out, 1e-9)
    laws.differ(found, laws.latents(made, asked(guidance=2.5)))
    laws.differ(laws.latents(made, asked(guidance=9.0)), laws.latents(made, asked(guidance=2.5)))  # the number is read


def test_a_negative_prompt_that_is_not_read_is_told():
    dev, plain = engine(toys.flux_distilled()), engine(toys.flux())
    told = dev.run(asked(negative="an owl")).notes["negative prompt not read"]
    assert "true_guidance" in told
    assert "negative prompt not read" not in dev.run(asked(negative="an owl", true_guidance=2.0)).notes
    assert "negative prompt not read" not in plain.run(asked(negative="an owl")).notes
    assert "off" in plain.run(asked(negative="an owl", guidance=1.0)).notes["negative prompt not read"]


def test_t5_reads_a_prompt_once_whatever_the_loras_do_to_clip(tmp_path):
    """Composite of three LoRAs, two of which change CLIP: T5, by far the larger, is asked for the prompt and its negative alone."""
    pipe = toys.flux()
    loras = [Lora(str(toys.lora(pipe, tmp_path / "a.safetensors", seed=1, text=False)))]
    for seed in (2, 3):
        path = toys.lora(pipe, tmp_path / f"{seed}.safetensors", seed=seed, text=True)
        from safetensors.torch import load_file, save_file

        save_file({key: value for key, value in load_file(path).items() if "text_encoder_2" not in key}, path)
        loras.append(Lora(str(path)))
    made, calls = engine(pipe), {"clip": 0, "t5": 0}
    handles = [part.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
               for name, part in (("clip", pipe.text_encoder), ("t5", pipe.text_encoder_2))]
    made.run(asked(loras=loras, method="composite"))
    for handle in handles:
        handle.remove()
    assert calls == {"clip": 6, "t5": 2}  # the negative and the prompt: by the base, with either LoRA; T5 by the base alone


def test_latents_are_packed_as_diffusers_packs_them():
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed(latents), reference.packed(latents))
    assert torch.equal(unpacked(packed(latents), (6, 10)), latents)


@pytest.mark.parametrize("make", [toys.flux, toys.sd3])
def test_sizes(make):
    made = engine(make())
    assert made.run(asked(size=(48, 32), steps=1)).images[0].size == (48, 32)
    with pytest.raises(Refused, match="multiples of 4; 32x32 is the nearest"):
        made.run(asked(size=(34, 32)))


def test_sd3_says_how_large_it_can_be():
    with pytest.raises(Refused, match="at most 96 pixels a side"):
        engine(toys.sd3()).run(asked(size=(128, 32)))


def test_sd3_without_t5_is_the_stock_pipeline_without_it(lora_files):
    def bare():
        pipe = toys.sd3(dtype=torch.float64)
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        return pipe

    made, pipe = engine(bare()), bare()
    request = laws.request("merge", laws.loras_of(lora_files["sd3"])[0], steps=4)
    reference.load(pipe, lora_files["sd3"][:1], [1.0])
    expected = reference.stock(pipe, request.prompt, "", 4, request.guidance, [torch.Generator().manual_seed(request.seed)], laws.SIDE)
    laws.same(laws.latents(made, request), expected, 1e-7)


def test_the_end_of_a_prompt_that_t5_cannot_see_is_told():
    made = engine(toys.flux())
    long = " ".join(["fox"] * 30)
    assert made.run(Request(long, steps=1)).notes["prompt cut"].split() == ["fox"] * (30 - (toys.T5_TOKENS - 1))
    assert "prompt cut" not in made.run(Request("the fox", steps=1)).notes


def test_blocks_are_the_models_own(tmp_path):
    """A factor on a block that is there changes the picture; one on another model's block is refused, not passed over."""
    for pipe, good, bad in ((toys.flux(), "single.1", "mid"), (toys.sd3(), "joint", "double.0"), (toys.sd(), "up.1", "single")):
        path = str(toys.lora(pipe, tmp_path / "a.safetensors", text=False))
        made = Engine(backbones.of(pipe, {"transformer": "flux", "unet": "sd"}[toys.denoiser(pipe)[0]]), "toy") if not hasattr(
            pipe, "text_encoder_3") else engine(pipe)
        whole = laws.latents(made, asked(loras=[Lora(path)]))
        laws.differ(laws.latents(made, asked(loras=[Lora(path, blocks={good: 0.0})])), whole)
        with pytest.raises(Refused, match=f"no block '{bad}'; its blocks are"):
            made.run(asked(loras=[Lora(path, blocks={bad: 0.0})]))
        made.close()


def test_t5s_embedding_may_be_stored_under_either_of_its_names(tmp_path):
    from safetensors.torch import load_file, save_file

    toys.flux().save_pretrained(tmp_path)
    file = tmp_path / "text_encoder_2/model.safetensors"
    tensors = load_file(file)
    key = "shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"
    other = {"shared.weight": "encoder.embed_tokens.weight", "encoder.embed_tokens.weight": "shared.weight"}[key]
    first = Engine.open(str(tmp_path), device="cpu").run(asked()).images[0].tobytes()
    value = tensors.pop(key)
    save_file(tensors | {other: value}, file, metadata={"format": "pt"})
    assert Engine.open(str(tmp_path), device="cpu").run(asked()).images[0].tobytes() == first
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match="incomplete: 1 tensors of its text_encoder_2"):
        Engine.open(str(tmp_path), device="cpu")
