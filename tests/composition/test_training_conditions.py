"""Condition LoRAs in training: one pair is learned, a resumed run is the uninterrupted one, and what is trained is what inference computes."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from composition import backbones, conditions
from composition.adapters.trainable import Trainable
from composition.backbones.flux import packed
from composition.hooks.banks import Appended, Banks, easycontrol
from composition.loras import condition as files
from composition.loras.condition import Settings
from composition.refusal import Refused
from composition.training import defaults, header, pair_pictures, state
from composition.training.condition import Learning, Rows, layers, train
from composition.training.pairs import Bucket, ConditionPlan, Pairs
from composition.training.still import recomputing, still
from tests import toys

SETTINGS = Settings(size=16, annotator="canny", bias=-1.0)


@pytest.fixture
def double():
    """Factors in float64, so that laws hold to the last digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def toy(make=toys.flux, dtype=torch.float64):
    return backbones.of(make(dtype=dtype), "flux")


def pairs(count=3, settings=SETTINGS, dtype=torch.float64, seed=0):
    """Two sizes of pictures, one of conditions."""
    rng = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(count, 4, *shape, generator=rng, dtype=dtype)

    words = [f"a fox {i}" for i in range(count)]
    buckets = [Bucket(some(16, 16), some(8, 8), words), Bucket(some(8, 16), some(8, 8), words[::-1])]
    return Pairs("edges", settings, buckets, torch.zeros(4, 8, 8, dtype=dtype), {"title": "Edges"}, f"{seed} {count}")


def leaf(checkpoint):
    return torch.load(checkpoint, weights_only=True)["leaf"]


class Lesson:
    """A step on the toy: its rows, its gradient."""

    def __init__(self, plan, settings=SETTINGS, make=toys.flux, alive=True):
        self.backbone, self.plan, self.pairs = toy(make), plan, pairs(settings=settings)
        self.banks = Banks(self.backbone.denoiser, tuple(self.backbone.prompt_attention()))
        self.trained = Trainable(["edges"], plan.rank, {"transformer": layers(self.backbone)}, self.backbone.device)
        if alive:
            self.trained.leaf.data.normal_(generator=torch.Generator().manual_seed(7)).mul_(0.3)
        self.learning = Learning(self.backbone, self.banks, self.trained, plan, settings.factor)
        self.rows = Rows(self.backbone, self.pairs, plan)

    def gradient(self, rows, checkpointing=False):
        """(loss, gradient) of these rows."""
        self.trained.leaf.grad = None
        self.trained.changed()
        with still(self.backbone.components.values()), recomputing(self.backbone.denoiser, self.banks.checkpoint if checkpointing else None):
            loss = self.learning(rows)
        return float(loss), self.trained.leaf.grad.clone()


def test_one_pair_is_learned_and_the_base_is_untouched(tmp_path):
    backbone = toy(dtype=torch.float32)
    before = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    picture = torch.tensor([3.0, -3.0, 3.0, -3.0]).view(1, 4, 1, 1).expand(1, 4, 8, 8)  # of one colour: a small model can say that
    one, seen = replace(pairs(1, dtype=torch.float32), buckets=[Bucket(picture, torch.randn(1, 4, 8, 8), ["a fox"])]), []
    plan = ConditionPlan(rank=4, rate=8e-2, steps=16, batch=1, views=2, noise=(3.0, 0.1), empty=0.0, drop=0.0, warm=2)
    file = train(backbone, one, plan, tmp_path, on_step=lambda step, losses, updates: seen.append(losses["edges"]))
    assert len(seen) == 16 and sum(seen[-4:]) < 0.9 * sum(seen[:4])
    for key, value in backbone.denoiser.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(weight.requires_grad for weight in backbone.denoiser.parameters())
    held = files.read(file, backbone.denoiser)
    assert held.settings == SETTINGS and held.receipt.title == "Edges" and not held.receipt.ignored
    roles = {path.rsplit(".attn.", 1)[1] for path in held.adapters[0]}
    assert roles == {"to_q", "to_k", "to_v", "to_out.0"}


@pytest.mark.parametrize("make", [toys.flux, toys.flux_distilled])
def test_resumed_equals_uninterrupted(tmp_path, double, make):
    plan = ConditionPlan(rank=2, rate=1e-2, steps=4, batch=1, views=2, drop=0.3, warm=2)
    train(toy(make), pairs(), plan, tmp_path / "whole", checkpoint=tmp_path / "whole.pt", save_every=4)
    count = iter(range(100))
    stopped = train(toy(make), pairs(), plan, tmp_path / "half", checkpoint=tmp_path / "half.pt", stop=lambda: next(count) == 1)
    assert stopped is None and state.reached(tmp_path / "half.pt") == 2
    train(toy(make), pairs(), plan, tmp_path / "half", checkpoint=tmp_path / "half.pt", save_every=4)
    assert torch.equal(leaf(tmp_path / "whole.pt"), leaf(tmp_path / "half.pt"))
    assert (tmp_path / "whole/edges.safetensors").read_bytes() == (tmp_path / "half/edges.safetensors").read_bytes()
    with pytest.raises(Refused, match="from other pictures"):
        train(toy(make), pairs(seed=1), plan, tmp_path / "other", checkpoint=tmp_path / "half.pt")


@pytest.mark.parametrize("make", [toys.flux, toys.flux_distilled])
def test_checkpointing_gives_the_same_gradient(double, make):
    lesson = Lesson(ConditionPlan(rank=2, batch=2, views=2, drop=0.4, steps=4), make=make)
    rows = lesson.rows.draw(1)
    (loss, plain), (again, checkpointed) = lesson.gradient(rows), lesson.gradient(rows, checkpointing=True)
    assert loss == pytest.approx(again, abs=1e-14) and plain.abs().max() > 0
    torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-14)
    assert not any(vars(module).get("gradient_checkpointing") for module in lesson.backbone.denoiser.modules())


def test_the_gradient_is_that_of_the_loss(double):
    """Against differences of the loss along a random direction."""
    lesson = Lesson(ConditionPlan(rank=2, batch=2, drop=0.0, steps=2))
    rows = lesson.rows.draw(0)
    _, gradient = lesson.gradient(rows)
    way = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in (1e-3, -2e-3):
        lesson.trained.leaf.data.add_(way, alpha=step)
        losses.append(lesson.gradient(rows)[0])
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(float((gradient * way).sum()), rel=1e-3)  # diffusers turns positions in float32


def test_views_of_a_pair_are_rows_with_a_bank_each(double):
    lesson = Lesson(ConditionPlan(rank=2, batch=2, views=3, drop=0.0, steps=2))
    rows = lesson.rows.draw(0)
    assert rows.noisy.shape[0] == 6 and rows.conditions.shape[0] == 2 and len(set(rows.t.tolist())) == 6
    together = lesson.gradient(rows)
    lesson.learning.plan = replace(lesson.plan, views=1)
    apart = lesson.gradient(rows._replace(conditions=rows.conditions.repeat_interleave(3, 0), alone=rows.cond))
    assert together[0] == pytest.approx(apart[0], rel=1e-12)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-5, atol=1e-10)  # diffusers turns positions in float32


def test_a_blank_condition_has_the_bases_own_answer_for_a_goal(double):
    """A condition that is not seen at all then costs nothing."""
    lesson = Lesson(ConditionPlan(rank=2, batch=4, drop=0.5, steps=20), replace(SETTINGS, bias=-20.0))
    drawn = lesson.rows.drawn.blank
    assert 0.3 < drawn.double().mean() < 0.7
    step = next(step for step in range(20) if 0 < drawn[step].sum() < 4)
    rows = lesson.rows.draw(step)
    assert torch.equal(rows.base_rows.rows, drawn[step].nonzero()[:, 0])
    assert (rows.conditions[drawn[step]] == 0).all() and (rows.conditions[~drawn[step]] != 0).any()
    only = rows.base_rows.rows
    alone = {name: value[:, only] for name, value in rows.cond.values.items()}
    kept = rows._replace(noisy=rows.noisy[only], t=rows.t[only], goal=rows.goal[only], conditions=rows.conditions[only],
                         cond=type(rows.cond)(alone), alone=type(rows.cond)(alone),
                         base_rows=rows.base_rows._replace(rows=torch.arange(len(only))))  # fmt: skip
    assert lesson.gradient(kept)[0] < 1e-12 < lesson.gradient(rows)[0]


@pytest.mark.parametrize("settings", [SETTINGS, Settings(kind="subject", size=16, offset=9, bias=-0.5)])
def test_what_is_trained_is_what_inference_computes(double, settings):
    """The denoiser's answer in a training step, against that of a bank filled through the engine's own parts."""
    lesson = Lesson(ConditionPlan(rank=2, batch=2, drop=0.0, steps=2, alpha=3.0), settings)
    rows, guesses = lesson.rows.draw(0), []
    denoise = lesson.backbone.denoise
    lesson.backbone.denoise = lambda *args: guesses.append(denoise(*args)) or guesses[-1]
    lesson.gradient(rows)
    lesson.backbone.denoise = denoise
    grid = tuple(side // 2 for side in rows.conditions.shape[-2:])
    for row in range(2):
        cond = type(rows.cond)({name: value[:, row : row + 1] for name, value in rows.cond.values.items()})
        ids = conditions.ids(settings, tuple(side // 2 for side in rows.noisy.shape[-2:]), grid)
        with torch.no_grad(), ExitStack() as stack:
            with lesson.banks.extracting(easycontrol(lesson.learning.factors())) as bank:
                lesson.backbone.read_alone(packed(rows.conditions[row : row + 1]), ids, torch.zeros(()), cond)
            stack.enter_context(lesson.banks.appended([Appended(bank, settings.factor)]))
            wanted = denoise(rows.noisy[row : row + 1], rows.t[row], cond)
        torch.testing.assert_close(guesses[0][:, row : row + 1].detach(), wanted, rtol=1e-9, atol=1e-12)


def test_steps_draw_from_both_sizes_and_times_from_the_plan(double):
    lesson = Lesson(ConditionPlan(rank=2, batch=2, steps=40, noise=(2.0, 0.5)))
    shapes = {tuple(lesson.rows.draw(step).noisy.shape[-2:]) for step in range(20)}
    assert shapes == {(16, 16), (8, 16)}
    assert 0.8 < float((lesson.rows.drawn.times / 1000).mean()) < 0.9


@pytest.mark.parametrize(("more", "words"), [({"drop": 1.0}, "shares"), ({"views": 0}, "views"), ({"rate": 0.0}, "rate")])
def test_a_wrong_plan_is_refused(more, words):
    with pytest.raises(Refused, match=words):
        ConditionPlan(**more)


def test_only_flux_is_trained(tmp_path):
    backbone = backbones.of(toys.sd(), "sd")
    with pytest.raises(Refused, match="FLUX"):
        train(backbone, pairs(), ConditionPlan(), tmp_path)


# pictures ----------------------------------------------------------------------------------------------------------------


def draw(folder: Path, count=3, size=(96, 64)) -> Path:
    folder.mkdir()
    for index in range(count):
        picture = Image.new("RGB", size, (240, 230 - 20 * index, 200))
        ImageDraw.Draw(picture).rectangle((10 + 5 * index, 8, 40 + 5 * index, 50), fill=(20, 60, 200))
        picture.save(folder / f"{index}.png")
    return folder


def test_a_folder_and_an_annotator_make_pairs_of_several_sizes(tmp_path):
    backbone, folder = toy(dtype=torch.float32), draw(tmp_path / "in")
    (folder / "metadata.jsonl").write_text("".join(f'{{"file_name": "{i}.png", "text": "a box {i}"}}\n' for i in range(3)))
    read = pair_pictures.read(folder, "canny", None, "spatial")
    make = {"sides": (16, 32), "count": 12, "flip": True, "words": {}}
    made, again, other = (pair_pictures.pairs(backbone, read, "edges", SETTINGS, seed=seed, **make) for seed in ("a", "a", "b"))
    assert sum(len(bucket.prompts) for bucket in made.buckets) == 12 and len(made.buckets) == 2
    assert {bucket.latents.shape[-2:] for bucket in made.buckets} == {(12, 20), (8, 8)} or len({b.latents.shape[-2:] for b in made.buckets}) == 2
    assert all(bucket.conditions.shape[1:] == made.blank.shape for bucket in made.buckets)
    assert {prompt for bucket in made.buckets for prompt in bucket.prompts} == {"a box 0", "a box 1", "a box 2"}
    assert all(torch.equal(a.latents, b.latents) and torch.equal(a.conditions, b.conditions) for a, b in zip(made.buckets, again.buckets, strict=True))
    assert not all(a.latents.shape == b.latents.shape and torch.equal(a.latents, b.latents) for a, b in zip(made.buckets, other.buckets, strict=True))


def test_a_second_folders_pictures_are_cut_and_mirrored_as_theirs(tmp_path):
    """The same pictures in both folders, and no annotator: a condition then is the picture itself, at the condition's size."""
    backbone, settings = toy(dtype=torch.float32), Settings(size=32)
    read = pair_pictures.read(draw(tmp_path / "in", size=(64, 64)), "", draw(tmp_path / "same", size=(64, 64)), "spatial")
    made = pair_pictures.pairs(backbone, read, "x", settings, sides=(32,), count=9, flip=True, seed="a", words={})
    (bucket,) = made.buckets
    assert toys.difference(bucket.latents, bucket.conditions) < 0.3
    assert len({float(latents.sum()) for latents in bucket.latents}) == 9


def test_wrong_folders_are_refused(tmp_path):
    folder, other = draw(tmp_path / "in"), draw(tmp_path / "other", 2)
    for arguments, words in (
        (("", None, "spatial"), "--annotator NAME, or --conditions DIR"), (("canny", other, "spatial"), "--annotator NAME, or --conditions"),
        (("canny", None, "subject"), "pictures of it by itself"), (("", other, "spatial"), "2.png has no condition picture"),
        (("nonsense", None, "spatial"), "no annotator")):
        with pytest.raises(Refused, match=words):
            pair_pictures.read(folder, *arguments)
    Image.new("RGB", (64, 64)).save(other / "2.png")
    with pytest.raises(Refused, match="2.png is 64x64 and 2.png 96x64"):
        pair_pictures.read(folder, "", other, "spatial")
    pair_pictures.read(folder, "", other, "subject")  # a subject may have any shape
    Image.new("RGB", (64, 64), "white").save(folder / "1.png")
    with pytest.raises(Refused, match="1.png: there are no edges"):
        pair_pictures.read(folder, "canny", None, "spatial")


@pytest.mark.parametrize(("picture", "wanted"), [((100, 100), (64, 64)), ((400, 100), (88, 48)), ((90, 100), (64, 64)), ((100, 190), (48, 88))])
def test_a_pictures_shape_is_kept_as_whole_tokens_allow(picture, wanted):
    assert pair_pictures.fitting(picture, 64, 8) == wanted


@pytest.mark.parametrize(("make", "wanted"), [(toys.flux, "a-model/lora"), (toys.flux_distilled, "flux-1-dev/lora")])
def test_the_header_of_a_flow_says_no_kind_of_prediction(make, wanted):
    words = header.header(toy(make, torch.float32), "a-model", ConditionPlan(), title="x", category="", trigger="", pictures=1, size=(32, 32), software="y")
    assert words["modelspec.architecture"] == wanted and "modelspec.prediction_type" not in words


def test_a_small_model_begins_with_its_condition_hardly_seen():
    usual = defaults.of_condition(toy(dtype=torch.float32))
    assert usual.bias < 0 and usual.size % 4 == 0 and len(set(usual.sides)) == 3
