"""Concept LoRAs: they learn, a resumed run is the uninterrupted one, others_weight changes nothing, stock diffusers agrees."""

import base64
import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from composition import backbones
from composition.adapters import Adapters
from composition.loop import Conditioning
from composition.refusal import Refused
from composition.request import Lora, Request
from composition.training import defaults, header, noise, previews, state
from composition.training.batches import Batches
from composition.training.concept import Concept, Plan, _base, choose, latents_of, train
from tests import toys


@pytest.fixture
def double():
    """Factors in float64, so that laws hold to the last digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def toy(dtype=torch.float64, make=toys.sd, **more):
    pipe = make(dtype=dtype, **more)
    backbone = backbones.of(pipe, make.__name__.removesuffix("_distilled"))
    return backbone, Adapters(backbone.components, family=backbone.family, block=backbone.block)


def concept(name, seed=0, count=6, dtype=torch.float64, side=16):
    latents = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Concept(name, latents, [f"a {name} {i % 3}" for i in range(count)], {"title": name, "trigger_words": name},
                   origin=f"{seed} {count}", others=["an owl", ""])  # fmt: skip


def trained(checkpoint):
    """(adapters, all factors of one)."""
    return torch.load(checkpoint, weights_only=True)["leaf"]


def learn(concepts, plan, folder, make=toys.sd, **kwargs):
    backbone, adapters = toy(make=make)
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


@pytest.mark.parametrize(("make", "extra"), [
    (toys.sd, {"targets": ("attention", "text")}), (toys.sd, {"keep": 0.3}), (toys.sdxl, {"keep": 0.3})])
def test_resumed_equals_uninterrupted(tmp_path, double, make, extra):
    plan = Plan(rank=2, steps=6, batch=2, warm=2, **extra)
    learn([concept("fox")], plan, tmp_path / "whole", make, checkpoint=tmp_path / "whole.pt", save_every=6)
    count = iter(range(100))
    stopped = learn(
        [concept("fox")], plan, tmp_path / "half", make, checkpoint=tmp_path / "half.pt", stop=lambda: next(count) == 2)
    assert stopped == {}
    assert state.reached(tmp_path / "half.pt") == 3
    learn([concept("fox")], plan, tmp_path / "half", make, checkpoint=tmp_path / "half.pt", save_every=6)
    assert torch.equal(trained(tmp_path / "whole.pt"), trained(tmp_path / "half.pt"))
    assert (tmp_path / "whole/fox.safetensors").read_bytes() == (tmp_path / "half/fox.safetensors").read_bytes()


@pytest.mark.parametrize(("make", "extra"), [
    (toys.sd, {"targets": ("attention", "feed_forward", "convolution")}), (toys.sd, {"keep": 0.25}),
    (toys.sd, {"targets": ("attention", "text"), "keep": 0.25}),
    (toys.sdxl, {"targets": ("attention", "projection"), "keep": 0.25, "noise": (0.0, 1.0)}),
    (toys.flux, {"targets": ("attention", "feed_forward", "projection"), "keep": 0.25, "noise": (0.0, 1.0)}),
    (toys.flux_distilled, {"targets": ("attention", "text")}), (toys.sd3, {"keep": 0.25})])
def test_trained_in_company_equals_trained_alone(tmp_path, double, make, extra):
    plan = Plan(rank=2, steps=4, batch=2, warm=2, **extra)
    both = [concept("fox", 1), concept("owl", 2)]
    learn(both, plan, tmp_path, make, checkpoint=tmp_path / "both.pt", save_every=4)
    company = trained(tmp_path / "both.pt")
    for k, one in enumerate(both):
        file = tmp_path / f"{one.name}.pt"
        learn([one], plan, tmp_path, make, checkpoint=file, save_every=4)
        torch.testing.assert_close(company[k : k + 1], trained(file), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [toys.sd, toys.sdxl, toys.sd3, toys.flux, toys.flux_distilled])
def test_a_time_for_each_picture_equals_one_at_a_time(double, make):
    backbone, adapters = toy(make=make)
    adapters.close()
    cond = backbone.encode(["a fox"], ["an owl"])
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = torch.tensor([3, 400, 999])
    with torch.no_grad():
        together = backbone.denoise(latents, times, cond)
        for index, t in enumerate(times):
            alone = backbone.denoise(latents[index : index + 1], t, cond)
            torch.testing.assert_close(together[:, index : index + 1], alone, rtol=1e-9, atol=1e-12)
            same = backbone.denoise(latents[index : index + 1], t[None], cond)
            assert torch.equal(same, alone)


def test_kept_rows_have_the_base_for_a_goal(double):
    """Against goals written out row by row."""
    backbone, adapters = toy()
    one, plan = concept("fox"), Plan(rank=2, batch=12, keep=0.3, empty=0.0)
    with adapters.training(["fox"], 2, choose(backbone.components, plan.targets)) as factors:
        factors.leaf.data.normal_()  # an adapter that says something, to be left out of the goals
        batch = Batches(backbone, adapters, [one], plan).draw(5)
        added = _base(backbone, adapters, batch, batch.base_rows)
    adapters.close()
    kept = batch.base_rows.rows.tolist()
    assert len(set(kept)) == len(kept) and len(kept) in (3, 4)
    for row in range(12):
        wanted = torch.zeros(4, 16, 16, dtype=torch.float64)
        if row in kept:
            index = kept.index(row)
            cond = Conditioning({"text": batch.base_rows.cond.values["text"][:, index : index + 1]})
            with torch.no_grad():
                wanted = backbone.denoise(batch.noisy[row : row + 1], batch.t[row], cond)[0, 0]
        torch.testing.assert_close(added[row], wanted, rtol=1e-9, atol=1e-12)
        assert (batch.goal[row] == 0).all() == (row in kept)


def test_checkpointing_and_previews_change_nothing(tmp_path, double):
    plan = Plan(rank=2, steps=3, batch=2, warm=1)
    learn([concept("fox")], plan, tmp_path, checkpoint=tmp_path / "plain.pt", save_every=3)
    for name, checkpointing in (("previews.pt", False), ("again.pt", True)):
        backbone, adapters = toy()
        seen = []

        def on_step(step, losses, backbone=backbone, adapters=adapters, seen=seen):
            seen.extend(previews.draw(backbone, adapters, Request(prompt="a fox", loras=[Lora("fox")], steps=2, count=2)))

        before = dict(vars(backbone.denoiser))
        train(backbone, adapters, [concept("fox")], plan, tmp_path, checkpoint=tmp_path / name, save_every=3,
              on_step=on_step, checkpointing=checkpointing)  # fmt: skip
        assert vars(backbone.denoiser) == before
        assert not backbone.denoiser.is_gradient_checkpointing
        adapters.close()
        assert len(seen) == 6
        assert seen[0].tobytes() != seen[4].tobytes()
        torch.testing.assert_close(trained(tmp_path / "plain.pt"), trained(tmp_path / name), rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("make", [toys.sd, toys.sdxl, toys.sd3, toys.flux, toys.flux_distilled])
def test_every_family_and_precision_trains(tmp_path, make, half):
    for dtype in (torch.float32, torch.bfloat16):
        backbone, adapters = toy(dtype, make)
        seen = []
        train(backbone, adapters, [concept("fox", dtype=torch.float32)], Plan(rank=2, steps=2, batch=2, half=half, keep=0.4),
              tmp_path, on_step=lambda step, losses, seen=seen: seen.append(losses["fox"]))  # fmt: skip
        adapters.close()
        assert len(seen) == 2 and all(loss > 0 for loss in seen)
    assert (tmp_path / "fox.safetensors").is_file()


def test_refuses_in_plain_words(tmp_path):
    with pytest.raises(Refused, match="unknown"):
        Plan(targets=("everything",))
    with pytest.raises(Refused, match="one each"):
        Concept("fox", torch.zeros(2, 4, 8, 8), ["a fox"])
    learn([concept("fox")], Plan(rank=2, steps=2, batch=2), tmp_path, checkpoint=tmp_path / "c.pt", save_every=1)
    plan = Plan(rank=2, steps=3, batch=2)
    for words, one, other in (("another plan", concept("fox"), plan), ("other concepts", concept("owl"), replace(plan, steps=2)),
                              ("other pictures", concept("fox", 3), replace(plan, steps=2))):
        with pytest.raises(Refused, match=f"{words}.*delete"):
            learn([one], other, tmp_path, checkpoint=tmp_path / "c.pt")
    for damage in (b"", b"nothing", (tmp_path / "c.pt").read_bytes()[:-900]):
        (tmp_path / "c.pt").write_bytes(damage)
        with pytest.raises(Refused, match="c.pt.*damaged.*delete"):
            learn([concept("fox")], plan, tmp_path, checkpoint=tmp_path / "c.pt")
    for wrong in ({"rate": 0.0}, {"rate": float("nan")}, {"steps": 0}, {"keep": 1.0}, {"empty": -0.1}):
        with pytest.raises(Refused):
            Plan(**wrong)


def test_a_flow_is_mixed_and_answered_as_rectified_flow():
    """x_s = (1 - s) x + s e; along the answer e - x a straight step of length s leads back to x."""
    flow = noise.of(toys.flux().scheduler)
    generator = torch.Generator().manual_seed(0)
    x, e = (torch.randn(64, 4, 2, 2, generator=generator) for _ in range(2))
    for spread in (None, (0.0, 1.1)):
        t = flow.times(64, spread, generator)
        assert 0 < t.min() and t.max() < 1000 and t.unique().numel() == 64
        noisy, goal = flow.mix(x, e, t)
        torch.testing.assert_close(noisy - t.view(-1, 1, 1, 1) / 1000 * goal, x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(noisy + (1 - t.view(-1, 1, 1, 1) / 1000) * goal, e, rtol=1e-4, atol=1e-5)


def test_targets_and_latents():
    backbone, adapters = toy(torch.float32)
    adapters.close()
    layers = choose(backbone.components, ("attention", "text"))
    assert all(path.endswith(("to_q", "to_k", "to_v", "to_out.0")) for path in layers["unet"])
    assert layers["text_encoder"]
    assert set(choose(backbone.components, ("feed_forward",))) == {"unet"}
    latents = latents_of(backbone, torch.zeros(3, 3, 32, 32))
    assert latents.shape == (3, 4, 16, 16)


def test_header_has_what_modelspec_asks_and_nothing_of_this_machine():
    backbone, adapters = toy()
    adapters.close()
    told = header.header(backbone, "/home/somebody/models/dream.safetensors", Plan(rank=4, rate=1e-3), title="My cat",
                         category="character", trigger="mycat", pictures=5, size=(32, 32), software="medley 1")  # fmt: skip
    assert told["modelspec.sai_model_spec"] == "1.0.1"
    assert told["modelspec.architecture"] == "dream/lora"
    assert (told["modelspec.title"], told["title"]) == ("My cat", "My cat")
    assert (told["modelspec.trigger_phrase"], told["trigger_words"]) == ("mycat", "mycat")
    assert told["modelspec.resolution"] == "32x32"
    assert (told["steps"], told["rank"], told["rate"], told["pictures"]) == ("500", "4", "0.001", "5")
    assert not any("/home" in value or "somebody" in value for value in told.values())
    names = {"pocket": "pocket", "org/name": "org/name", "./a/b": "b", "~/b": "b", "C:\\models\\b": "b", "b.safetensors": "b"}
    assert {given: header.plain_name(given) for given in names} == names


def test_thumbnail_is_small_whatever_the_picture():
    for picture in (Image.effect_noise((600, 400), 200).convert("RGB"), Image.new("RGB", (64, 64), "red")):
        data = base64.b64decode(previews.thumbnail(picture), validate=True)
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.format == "PNG"
            assert max(opened.size) <= 128
        assert len(data) <= 40_000


def test_defaults_by_size():
    backbone, adapters = toy()
    adapters.close()
    usual = defaults.of(backbone)
    assert (usual.count(1), usual.count(10_000)) == (usual.views, 10_000)
    assert defaults.halves(torch.device("cpu"), torch.bfloat16)
    assert defaults.dtype_for("cpu", None) == "float32"
    assert defaults.dtype_for(None, "bfloat16") == "bfloat16"
