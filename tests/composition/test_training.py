"""Concept LoRAs: they learn, a resumed run is the uninterrupted one, company changes nothing, stock diffusers agrees."""

import pytest
import torch
from safetensors import safe_open

from composition.adapters import Adapters
from composition.backbones.unet import UNetBackbone
from composition.request import Refused
from composition.training.concept import Concept, Plan, choose, latents_of, train
from tests import toys


@pytest.fixture
def double():
    """Factors in float64, so that laws hold to the last digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def toy(dtype=torch.float64, make=toys.sd):
    pipe = make(dtype=dtype)
    backbone = UNetBackbone(pipe, "sd" if make is toys.sd else "sdxl")
    return backbone, Adapters(backbone.components, family=backbone.family, block=backbone.block)


def concept(name, seed=0, count=6, dtype=torch.float64, side=16):
    latents = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Concept(name, latents, [f"a {name} {i % 3}" for i in range(count)], {"title": name, "trigger_words": name})


def parts(checkpoint):
    return torch.load(checkpoint, weights_only=True)["parts"]


def learn(concepts, plan, folder, **kwargs):
    backbone, adapters = toy()
    try:
        return train(backbone, adapters, concepts, plan, folder, **kwargs)
    finally:
        adapters.close()


def test_loss_falls_and_the_base_is_untouched(tmp_path, double):
    backbone, adapters = toy()
    before = {k: v.clone() for k, v in backbone.denoiser.state_dict().items()}
    seen = []
    plan = Plan(rank=4, rate=1e-2, steps=40, batch=2, warm=5, targets=("attention", "feed_forward", "convolution"))
    one = concept("fox", count=1)
    train(backbone, adapters, [one], plan, tmp_path, on_step=lambda step, losses: seen.append(losses["fox"]))
    assert sum(seen[-10:]) < 0.8 * sum(seen[:10])
    assert len(seen) == 40
    for key, value in backbone.denoiser.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(not p.requires_grad for p in backbone.denoiser.parameters())


def test_resumed_equals_uninterrupted(tmp_path, double):
    plan = Plan(rank=2, steps=6, batch=2, warm=2, targets=("attention", "text"))
    learn([concept("fox")], plan, tmp_path / "whole", checkpoint=tmp_path / "whole.pt", save_every=6)
    count = iter(range(100))
    stopped = learn([concept("fox")], plan, tmp_path / "half", checkpoint=tmp_path / "half.pt", stop=lambda: next(count) == 2)
    assert stopped == {}
    learn([concept("fox")], plan, tmp_path / "half", checkpoint=tmp_path / "half.pt", save_every=6)
    for a, b in zip(parts(tmp_path / "whole.pt"), parts(tmp_path / "half.pt"), strict=True):
        assert torch.equal(a, b)


def test_trained_in_company_equals_trained_alone(tmp_path, double):
    plan = Plan(rank=2, steps=4, batch=2, warm=2, targets=("attention", "feed_forward", "convolution"))
    both = [concept("fox", 1), concept("owl", 2)]
    learn(both, plan, tmp_path, checkpoint=tmp_path / "both.pt", save_every=4)
    company = parts(tmp_path / "both.pt")
    for k, one in enumerate(both):
        file = tmp_path / f"{one.name}.pt"
        learn([one], plan, tmp_path, checkpoint=file, save_every=4)
        for index, (mine, together) in enumerate(zip(parts(file), company, strict=True)):
            span = slice(2 * k, 2 * k + 2)
            torch.testing.assert_close(together[:, span] if index % 2 else together[span], mine, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_stock_diffusers_reads_the_file(tmp_path, alpha):
    pytest.importorskip("peft")
    backbone, adapters = toy(torch.float32)
    plan = Plan(rank=2, alpha=alpha, rate=2e-2, steps=8, batch=2, warm=1, targets=("attention", "convolution", "text"))
    file = train(backbone, adapters, [concept("fox", dtype=torch.float32)], plan, tmp_path)["fox"]
    adapters.close()
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["trigger_words"] == "fox"
        factors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
    layers = {key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight")}
    assert any(layer.startswith("text_encoder.text_model.") for layer in layers)

    stock = toys.sd()
    bare = {f"{c}.{n}": p.detach().clone() for c in ("unet", "text_encoder") for n, p in getattr(stock, c).named_parameters()}
    stock.load_lora_weights(file)
    stock.fuse_lora(components=["unet", "text_encoder"])
    stock.unload_lora_weights()
    after = {f"{c}.{n}": p for c in ("unet", "text_encoder") for n, p in getattr(stock, c).named_parameters()}
    scale = 1.0 if alpha is None else alpha / 2
    for layer in layers:
        name = f"{layer}.weight" if f"{layer}.weight" in bare else f"{layer.replace('text_model.', '')}.weight"
        a, b = factors[f"{layer}.lora_A.weight"], factors[f"{layer}.lora_B.weight"]
        wanted = scale * (b.flatten(1) @ a.flatten(1)).view(bare[name].shape)
        torch.testing.assert_close(after[name] - bare[name], wanted, rtol=1e-3, atol=1e-5)


def test_sdxl_trains(tmp_path):
    backbone, adapters = toy(torch.float32, toys.sdxl)
    seen = []
    train(backbone, adapters, [concept("fox", dtype=torch.float32)], Plan(rank=2, steps=2, batch=2), tmp_path,
          on_step=lambda step, losses: seen.append(losses))  # fmt: skip
    assert len(seen) == 2 and (tmp_path / "fox.safetensors").is_file()


def test_refuses_in_plain_words(tmp_path):
    with pytest.raises(Refused, match="unknown"):
        Plan(targets=("everything",))
    with pytest.raises(Refused, match="one each"):
        Concept("fox", torch.zeros(2, 4, 8, 8), ["a fox"])
    learn([concept("fox")], Plan(rank=2, steps=2, batch=2), tmp_path, checkpoint=tmp_path / "c.pt", save_every=1)
    with pytest.raises(Refused, match="another plan"):
        learn([concept("fox")], Plan(rank=2, steps=3, batch=2), tmp_path, checkpoint=tmp_path / "c.pt")


def test_targets_and_latents():
    backbone, adapters = toy(torch.float32)
    adapters.close()
    layers = choose(backbone.components, ("attention", "text"))
    assert all(path.endswith(("to_q", "to_k", "to_v", "to_out.0")) for path in layers["unet"])
    assert layers["text_encoder"]
    assert set(choose(backbone.components, ("feed_forward",))) == {"unet"}
    latents = latents_of(backbone, torch.zeros(3, 3, 32, 32))
    assert latents.shape == (3, 4, 16, 16)
