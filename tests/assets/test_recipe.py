"""Pieces of the recipe: the optimiser, the latents' turn, the judge's questions, the testbed's form."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from assets.recipe import autoencoder, base, export, flux, judge, loras, testbed, tokenizer, unigram
from assets.recipe.labelled import Named
from assets.recipe.loop import Loop
from assets.recipe.muon import Muon, orthogonal
from assets.recipe.shorten import shorten
from composition.training.concept import TARGETS


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6)])
def test_an_update_is_nearly_orthogonal(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1)), rounds=8))
    assert values.min() > 0.5 and values.max() < 1.4


def test_muon_moves_every_direction_by_the_rate():
    weight = torch.nn.Parameter(torch.zeros(16, 32))
    strengths = torch.logspace(0, -1, 16)  # plain descent would go ten times as far along the first direction
    weight.grad = strengths.diag() @ torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(0))).Q.T
    Muon([weight], lr=0.1).step()
    along = torch.linalg.svdvals(weight.detach())
    assert along.max() / along.min() < 2.5
    # singular values of one give a mean square of 1 / 32; times 0.2 * sqrt(32), times the rate
    assert weight.detach().pow(2).mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.35)


def test_a_kernel_counts_as_a_matrix():
    kernel, matrix = torch.nn.Parameter(torch.zeros(8, 4, 3, 3)), torch.nn.Parameter(torch.zeros(8, 36))
    kernel.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    matrix.grad = kernel.grad.flatten(1)
    Muon([kernel, matrix], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_matrices_of_one_shape_are_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 10, generator=generator) for _ in range(3)]
    together, alone = ([torch.nn.Parameter(torch.ones(6, 10)) for _ in values] for _ in range(2))
    for weights in (together, alone):
        for weight, value in zip(weights, values, strict=True):
            weight.grad = value.clone()
    Muon(together, lr=0.1).step()
    for weight in alone:
        Muon([weight], lr=0.1).step()
    torch.testing.assert_close(torch.stack(list(together)), torch.stack(list(alone)), rtol=1e-2, atol=1e-4)


def test_a_loops_budget_may_be_told_when_all_is_ready(tmp_path):
    net, asked = torch.nn.Linear(2, 1), []

    def minutes():
        asked.append(net.weight.grad is None and loop.step == 0)
        return 0.02 / 60

    loop = Loop(net, tmp_path / "a.pt", minutes=minutes, peak=1e-2)
    loop.run(iter([(torch.ones(1, 2),)] * 100_000), lambda x: net(x).sum())
    assert asked == [True] and loop.step > 0 and Loop.reached(tmp_path / "a.pt") == loop.seen


def test_loras_train_together_by_their_number_of_steps():
    groups = loras.groups(["raccoon", "scarf", "owl", "top hat", "moon"], replace(loras.PLAN, steps=10), together=2)
    assert [(group.names, group.plan.steps) for group in groups] == [
        (("raccoon", "owl"), 10), (("moon",), 10), (("scarf", "top hat"), 20)]  # fmt: skip


def test_a_loop_resumes_with_both_optimisers(tmp_path):
    def make():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        return net, Loop(net, tmp_path / "a.pt", minutes=0, peak=1e-2, hidden=lambda name: name.startswith("0."))

    net, loop = make()
    assert [type(o).__name__ for o in loop.optimisers] == ["AdamW", "Muon"]
    trained = {id(p) for o in loop.optimisers for group in o.param_groups for p in group["params"]}
    assert trained == {id(p) for p in net.parameters()}
    net(torch.ones(2, 4)).sum().backward()
    for optimiser in loop.optimisers:
        optimiser.step()
    loop.save()
    again, resumed = make()
    assert torch.equal(again[0].weight, net[0].weight)
    held = [o.state_dict()["state"] for o in resumed.optimisers]
    assert all(held) and torch.equal(held[1][0]["held"], loop.optimisers[1].state_dict()["state"][0]["held"])


def test_settled_latents_are_uncorrelated_ordered_and_decode_as_before(monkeypatch):
    torch.manual_seed(3)
    vae = autoencoder.build(32, channels=4, blocks=(8, 16)).eval()
    generator = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(64, 3, 4, 4, generator=generator), (32, 32), mode="bilinear")
    pictures = (smooth * 255).byte().permute(0, 2, 3, 1).numpy()
    monkeypatch.setattr(autoencoder, "some", lambda wide, first, count: pictures[:count])
    x = autoencoder.tensor(pictures)
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        autoencoder.settle(vae, None, count=64)
        z = vae.encode(x).latent_dist.mean
        after = vae.decode(z).sample
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    spread = flat.T.cov()
    assert flat.mean(0).abs().max() < 1e-3 and flat.pow(2).mean() == pytest.approx(1, rel=0.01)
    assert (spread - spread.diag().diag()).abs().max() < 1e-3
    assert (spread.diag().diff() <= 1e-5).all()
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    assert vae.encode(x).latent_dist.std.max() < 1e-3


def test_muon_takes_the_inner_matrices_alone():
    assert base.hidden("unet.mid_block.resnets.0.conv1.weight") and base.hidden("text.encoder.layers.0.mlp.fc1.weight")
    assert not any(base.hidden(n) for n in ("unet.conv_in.weight", "unet.conv_out.weight", "unet.time_embedding.linear_1.weight",
                                            "text.embeddings.token_embedding.weight"))  # fmt: skip


NAMED = Named(["cat", "fox", "owl", "robot"], ["snow", "beach"], ["ink", "neon"])


class Words:
    """Stands for a tokenizer: every text is its own number."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts, **_):
        self.texts += [text for text in texts if text not in self.texts]
        ids = torch.zeros(len(texts), judge.LENGTH, dtype=torch.long)
        ids[:, 0] = torch.tensor([self.texts.index(text) for text in texts])
        return type("Read", (), {"input_ids": ids})


def scene(*names, place="snow", style="", caption="a fox in the snow"):
    return judge.Labelled(None, frozenset(names), place, style, caption)


def asked(scenes, count=2):
    """The texts that the judge is asked of these scenes, and the truth of each, (B, T)."""
    words = Words()
    known = judge.answers(torch.from_numpy(judge.labels(NAMED, words, scenes)), len(NAMED.names))
    questions = judge.Questions(NAMED, words, torch.device("cpu"), count)
    found = questions.ask(torch.zeros(len(scenes), 3, 2, 2), known)
    return [words.texts[number] for number in found.ids[:, 0].tolist()], found


def test_the_judge_is_asked_what_is_true_and_what_is_not():
    scenes = [scene("fox", "cat", caption="a fox and a cat in the snow"), scene("robot", place="beach", style="ink", caption="x")] * 4
    texts, found = asked(scenes, 4)
    plain = {text.removeprefix("a picture of "): found.truth[:, i].tolist() for i, text in enumerate(texts)}
    assert found.truth.shape == (8, len(texts)) and len(texts) == 4 + 2 + 2 + 2
    assert plain["a fox"] == [1, 0] * 4 and plain["a robot"] == [0, 1] * 4 and plain["an owl"] == [0] * 8
    assert plain["in the snow"] == [1, 0] * 4 and plain["ink drawing"] == [0, 1] * 4
    assert sum(plain["neon lights"]) == 0
    assert found.names[0].tolist() == [1, 1, 0, 0]


def test_names_in_the_pictures_are_asked_first():
    texts, _ = asked([scene("robot"), scene("robot", "fox")] * 2, 2)
    assert {text.removeprefix("a picture of ") for text in texts[:2]} == {"a robot", "a fox"}


def test_a_caption_is_no_untruth_of_another_picture_that_holds_it():
    scenes = [scene("fox", "cat", caption="a fox and a cat in the snow"), scene("robot", "fox", caption="a robot"),
              scene("fox", "cat", "robot"), scene("cat", place="beach")] * 4  # fmt: skip
    texts, found = asked(scenes)
    column = found.truth[:, texts.index("a fox and a cat in the snow")]
    assert column[:4].tolist() == [1, 0, -1, 0]


def test_the_testbed_has_composloras_form():
    rows = testbed.testbed()
    assert list(rows) == ["character", "clothing", "object", "background", "style"]
    assert len(rows["character"]) >= 6 and all(len(rows[c]) >= 3 for c in rows)
    for entries in rows.values():
        for entry in entries:
            assert set(entry) >= {"id", "name", "trigger", "url"} and entry["trigger"][0] in entry["phrase"]
    said = "".join(entries[0]["phrase"] for entries in rows.values())
    assert said == "a raccoon wearing a top hat and a bicycle on the moon, ink drawing"


def test_the_lora_plan_names_known_layers():
    assert set(loras.PLAN.targets) <= set(TARGETS)


SD = Path(__file__).parents[2] / "assets/pocket128/sd"


@pytest.fixture(scope="module")
def teacher():
    vae = AutoencoderKL.from_pretrained(SD / "vae")
    vae.register_to_config(shift_factor=0.3, scaling_factor=1.7)
    return flux.Teacher(SD, vae, torch.device("cpu"))


def test_a_teacher_that_knows_the_truth_says_the_velocity(teacher, monkeypatch):
    """With the v of the very latents and noise for an answer, the goal is noise - latents in the second base's units."""
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(3, 12, 16, 16, generator=rng), torch.randn(3, 12, 16, 16, generator=rng)
    steps = torch.tensor([5, 500, 990])
    a, b = base.scheduler().alphas_cumprod[steps].sqrt(), (1 - base.scheduler().alphas_cumprod[steps]).sqrt()
    a, b = a[:, None, None, None], b[:, None, None, None]
    shown = []

    def knows(unet, mixed, at, words):
        shown.append(mixed)
        return a * noise - b * latents

    monkeypatch.setattr(teacher, "predict", knows)
    goal = teacher.velocity(latents, noise, steps, torch.zeros(3, 32, dtype=torch.long))
    torch.testing.assert_close(goal, noise - (latents - 0.3) * 1.7, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shown[0].float(), a * latents + b * noise, rtol=1e-2, atol=1e-2)


def test_teacher_and_pupil_see_the_same_noisy_latents(teacher):
    """(1 - s) (z - shift) scale + s n, shifted and scaled back, is z with sigma times the same noise."""
    torch.manual_seed(0)
    steps, s = teacher.levels(2000)
    kept = base.scheduler().alphas_cumprod[steps]
    torch.testing.assert_close(s / (1 - s) / 1.7, ((1 - kept) / kept).sqrt(), rtol=1e-3, atol=1e-5)
    logits = s.logit()
    assert logits.mean() == pytest.approx(flux.CENTRE, abs=0.1) and logits.std() == pytest.approx(flux.WIDTH, abs=0.1)


def test_t5_begins_with_what_clip_says_of_each_piece():
    clip_words = CLIPTokenizer.from_pretrained(SD / "tokenizer")
    words = unigram.build(["a fox and a robot in the snow"] * unigram.OFTEN)
    t5, clip = flux.build_t5(words), base.build_text(clip_words).eval()
    flux.spell(t5, words, clip, clip_words)
    row = t5.shared.weight[words.convert_tokens_to_ids("▁robot")]
    tokens = tokenizer.ids(clip_words, ["robot"])
    last = tokens[0].tolist().index(clip_words.eos_token_id) - 1
    state = clip(tokens).last_hidden_state[0, last]
    torch.testing.assert_close(row, state / state.pow(2).mean().sqrt())
    assert torch.equal(t5.encoder.embed_tokens.weight, t5.shared.weight)


def test_a_second_base_begins_with_the_weights_of_a_folder(tmp_path):
    vae = AutoencoderKL.from_pretrained(SD / "vae", dtype=torch.float32)
    clip, t5 = CLIPTokenizer.from_pretrained(SD / "tokenizer"), unigram.build(["a fox in the snow"] * 60)
    shape = {"width": 32, "double": 1, "single": 1}
    torch.manual_seed(1)
    held, other = flux.build(vae, clip, t5, **shape), flux.build(vae, clip, t5, **shape)
    export.export_flux(held, vae, clip, t5, tmp_path / "flux")
    flux.load(other, tmp_path / "flux")
    assert all(torch.equal(mine.half(), theirs) for mine, theirs in zip(other.parameters(), held.parameters(), strict=True))
    assert all(torch.equal(weight.bfloat16().float(), weight) for weight in other.parameters())


def test_a_shortened_lora_is_the_nearest_of_its_rank(tmp_path):
    rng = torch.Generator().manual_seed(3)
    down, up, wide = torch.randn(8, 12, generator=rng), torch.randn(10, 8, generator=rng), torch.randn(8, 3, 3, 3, generator=rng)
    tensors = {"unet.a.lora_A.weight": down, "unet.a.lora_B.weight": up, "unet.b.lora_A.weight": wide,
               "unet.b.lora_B.weight": torch.randn(5, 8, 1, 1, generator=rng)}  # fmt: skip
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata={"title": "A"})
    kept = shorten(file, 5)
    short = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in short.items()} == {
        "unet.a.lora_A.weight": (5, 12), "unet.a.lora_B.weight": (10, 5), "unet.b.lora_A.weight": (5, 3, 3, 3), "unet.b.lora_B.weight": (5, 5, 1, 1)}  # fmt: skip
    strengths = torch.linalg.svdvals(up @ down)
    error = (up @ down - short["unet.a.lora_B.weight"] @ short["unet.a.lora_A.weight"]).norm()
    torch.testing.assert_close(error, strengths[5:].norm(), rtol=1e-4, atol=1e-4)
    conv = tensors["unet.b.lora_B.weight"].flatten(1) @ wide.flatten(1)  # of rank 5 already
    torch.testing.assert_close(short["unet.b.lora_B.weight"].flatten(1) @ short["unet.b.lora_A.weight"].flatten(1), conv, rtol=1e-4, atol=1e-4)
    conv_energy = torch.linalg.svdvals(conv).square().sum()
    assert kept == pytest.approx(float((strengths[:5].square().sum() + conv_energy) / (strengths.square().sum() + conv_energy)), rel=1e-5)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["title"] == "A"
    before = file.read_bytes()
    assert shorten(file, 5) == 1.0 and file.read_bytes() == before
