"""W-Switch, W-Composite, Switch-A against their recipes; frequency profiles against loops by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from composition import Engine, Lora, Refused
from composition.loop import Conditioning
from composition.methods import switch_a, w_composite, w_switch
from composition.methods.shared import spectrum
from composition.profiles.frequency import Profile, ordered
from composition.profiling import lorahub
from composition.profiling.frequency import change, measure
from composition.run import Run
from tests.composition import laws


class Words(Run):
    """A run whose text vectors are known: each word is an axis, a text is the mean of its words over 4 positions."""

    axes = ("fox", "owl", "moon", "and", "the")
    always, backbone, inversions = {}, None, {}

    def __init__(self, prompt, **triggers):
        self.request = SimpleNamespace(prompt=prompt, schema_version=1, active={name: Lora(name) for name in triggers})
        self.triggers = {name: tuple(words) for name, words in triggers.items()}

    def encode(self, text, use):
        assert use == {}
        rows = torch.zeros(2, 1, 4, len(self.axes))
        for place, word in enumerate(text.replace(",", "").split()[:4]):
            rows[1, 0, place, self.axes.index(word)] = 1.0
        return Conditioning({"text": rows})


def test_need_is_what_the_prompt_loses():
    run = Words("fox fox owl", a=["fox"], b=["owl"])
    whole, no_owl = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.0])
    expected = [2.0, 1 - float(torch.nn.functional.cosine_similarity(whole, no_owl, dim=0))]  # "owl": under five letters, all is lost
    assert list(w_switch.needs(run).values()) == pytest.approx(expected)
    run = Words("the moon and fox", a=["fox"], b=["moon"], c=[], d=["owl"])
    share = 1 - (3 / 4) ** 0.5
    raw = [share, share, 0.1, 0.05]  # no trigger words: 0.1; words that are not in the prompt: the least
    assert list(w_switch.needs(run).values()) == pytest.approx(raw)


def test_blocks_are_as_long_as_the_need():
    assert w_switch.lengths([0.6, 0.3, 0.1], 5) == [5, 2, 1]
    assert w_switch.lengths([0.999, 0.001], 5) == [5, 1]


def test_trigger_words_are_taken_out_whole_and_in_any_case():
    assert w_switch.without("A Fox, foxes and a fox", ["fox"]) == "A , foxes and a"
    assert w_switch.without("ink (drawing) of x", ["(drawing)"]) == "ink of x"


def test_nearness_is_the_cosine_of_the_triggers_and_sums_to_one():
    found = w_composite.nearness(Words("fox owl", a=["fox"], b=["moon"], c=[]), ("a", "b", "c"))
    raw = [0.5**0.5, 0.01]
    raw.append(sum(raw) / 2)
    assert list(found.values()) == pytest.approx([value / sum(raw) for value in raw])


@pytest.fixture(params=["sd", "sdxl", "sd3", "flux"])
def case(request, engines, lora_files):
    loras = laws.loras_of(lora_files[request.param])
    return engines[request.param], [replace(lora, category=kind) for lora, kind in zip(loras, ("place", "character", "style"), strict=True)]


def leaders(engine, method, loras, steps=20, **options):
    asked = laws.request(method, *loras, steps=steps, options=options, sampler="euler")
    return engine.run(asked).notes["leaders"], asked.names


def test_w_switch_gives_the_last_steps_to_the_character(case):
    engine, loras = case
    told = [replace(lora, triggers=("fox",)) for lora in loras]  # alike: all blocks are tau
    led, names = leaders(engine, "w-switch", told, tau=2, last=4)
    assert led[-4:] == [names[1]] * 4 and led[:6] == [names[0]] * 2 + [names[1]] * 2 + [names[2]] * 2


def test_switch_a_leaves_its_first_rotation_and_uses_the_low(case):
    engine, loras = case
    led, names = leaders(engine, "switch-a", loras, tau=2)
    assert set(led[:12]) == {names[1], names[2]} and led[:4] == [names[1]] * 2 + [names[2]] * 2
    assert names[0] in led[12:] and names[1] not in led[12:]
    assert switch_a.Options().tau == 5


# LoraHub ---------------------------------------------------------------------------------------------------------------


class Known(Engine):
    """An engine whose pictures are their request: the score can be known."""

    def __init__(self):
        self.asked = []

    def run(self, request, on_step=None, cancel=None):
        self.asked.append(request)
        return SimpleNamespace(images=[request] * request.count)


def test_lorahub_finds_the_weights_of_a_known_score():
    """A score with its peak at factors (0.3, 1.2, 0.9), near enough after forty trials; the noise is the same in all."""
    engine, aim = Known(), (0.3, 1.2, 0.9)
    request = laws.request("composite", Lora("a", weight=0.5), Lora("b"), Lora("c", text_weight=2.0), seed=5)

    def score(pictures):
        assert len(pictures) == 2
        factors = [pictures[0].loras[0].weight / 0.5, pictures[0].loras[1].weight, pictures[0].loras[2].weight]
        return 1 - sum((x - a) ** 2 for x, a in zip(factors, aim, strict=True))

    found = lorahub.search(engine, request, score)
    weights = [found.request.loras[0].weight / 0.5, found.request.loras[1].weight, found.request.loras[2].weight]
    assert weights == pytest.approx(aim, abs=0.1)
    assert len(found.trials) == len(engine.asked) <= 40 and found.trials[0][0] == (1.0, 1.0, 1.0)
    assert found.score == max(value for _, value in found.trials[-20:]) > found.trials[0][1]
    assert {(asked.seed, asked.method, asked.steps) for asked in engine.asked} == {(5, "merge", 20)}
    assert all(0 <= x <= 1.5 for factors, _ in found.trials for x in factors)
    assert found.request.method == "composite" and found.request.steps == request.steps
    assert found.request.loras[2].text_weight == pytest.approx(2.0 * weights[2])
    again = lorahub.search(Known(), request, score)
    assert again.trials == found.trials


def test_lorahub_of_an_engine(case):
    """On a toy: the score it reports is that of the request it returns."""
    engine, loras = case
    request = laws.request("merge", *loras[:2])
    dark = lambda pictures: 1 - sum(sum(picture.convert("L").tobytes()) / (255 * picture.width * picture.height) for picture in pictures) / len(pictures)  # noqa: E731
    found = lorahub.search(engine, request, dark, budget=6, seeds=1, steps=3)
    made = engine.run(replace(found.request, steps=3, count=1, method="merge"))
    assert dark(made.images) == pytest.approx(found.score) and found.score >= found.trials[0][1]


def test_lorahub_without_loras_is_refused():
    with pytest.raises(Refused, match="has no LoRA"):
        lorahub.search(Known(), laws.request("merge"), lambda pictures: 0.0)


# profiles --------------------------------------------------------------------------------------------------------------


def test_a_profile_is_measured_as_its_formula_says(case):
    """By hand: H after every step of each picture, with the LoRA and without."""
    engine, loras = case
    lora = loras[1]
    found = measure(engine, lora, prompt="the fox", steps=10, seeds=2)
    courses = {}
    for live in (True, False):
        for seed in (0, 1):
            asked = laws.request("merge", *([lora] if live else []), prompt="the fox", steps=10, seed=seed, guidance=None, negative="", size=None)
            course = []
            engine.run(asked, on_step=lambda event, course=course: course.append(float(spectrum.high(event.latents)[0])))
            courses[live, seed] = course
    steps = len(courses[True, 0])
    moved = lambda c: sum(abs(c[t + 1] - c[t]) for t in range(int(0.6 * steps))) / int(0.6 * steps)  # noqa: E731
    assert found.change == pytest.approx(sum(moved(courses[True, s]) - moved(courses[False, s]) for s in (0, 1)) / 2, abs=1e-6)
    assert found.high == pytest.approx([(a + b) / 2 for a, b in zip(courses[True, 0], courses[True, 1], strict=True)])
    early = int(0.6 * steps)
    assert found.level == pytest.approx((sum(found.high[:early]) - sum(found.base[:early])) / early)
    assert Profile.read(found.json()) == found


def test_a_lora_of_weight_zero_changes_nothing(case):
    engine, loras = case
    found = measure(engine, replace(loras[1], weight=0.0), prompt="the fox", steps=6, seeds=1)
    assert found.change == pytest.approx(0, abs=1e-9) and found.level == pytest.approx(0, abs=1e-9)


def test_change_of_short_and_flat_courses():
    assert change([0.5] * 20) == 0 and change([0.5]) == 0 and change([0.1, 0.4]) == pytest.approx(0.3)
    assert change([t * 0.01 for t in range(50)]) == pytest.approx(0.05)


def profile(value, level=0.0):
    return Profile("x", "0" * 64, "m", "p", 4, 1, (level,) * 4, (0.0,) * 4, value)


def test_order_and_partition():
    assert ordered({"a": profile(0.1), "b": profile(0.3), "c": profile(-0.1)}) == (["b", "a", "c"], ["c"])
    assert ordered({"a": profile(0.1), "b": profile(0.3), "c": profile(0.2)}) == (["b", "c", "a"], ["a"])  # none under the base: the last
    assert ordered({"a": profile(0.1), "b": profile(0.3)}) == (["b", "a"], [])
    assert ordered({"a": profile(-0.1), "b": profile(-0.3)}) == (["a", "b"], [])  # all low is none low
    assert ordered({"a": profile(0.9, -1.0), "b": profile(0.1, 1.0)}, "level") == (["b", "a"], ["a"])


def test_what_is_no_profile_is_refused():
    with pytest.raises(Refused, match="profile"):
        Profile.read("{}")
    assert Lora("x").name == "x"
