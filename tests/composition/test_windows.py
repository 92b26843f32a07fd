"""Content early, style late: a part of the steps for LoRAs of a known category that have none, settled once and recorded."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from composition import Engine, Lora, Request, methods, record, windows
from composition.backbones.unet import UNetBackbone
from composition.batch import Identity
from composition.loop import Step
from tests import toys
from tests.composition import laws

CATEGORIES = ("character", "object", "clothing", "place", "pose", "style", "other")
CONTENT, STYLE = (0.0, 0.7), (0.3, 1.0)


@pytest.fixture(autouse=True)
def quick(shapes_unchecked):
    """Shapes are checked where the methods are."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """With a LoRA of every category, as its file says, named after it, and one, "plain", of none."""
    folder, pipe = tmp_path_factory.mktemp("library"), toys.sd(dtype=torch.float64)
    for seed, name in enumerate((*CATEGORIES, "plain")):
        path = toys.lora(pipe, folder / f"{name}.safetensors", seed=seed)
        if name != "plain":
            save_file(load_file(path), path, metadata={"category": name})
    return Engine(UNetBackbone(pipe, "sd"), "toy", folders=[folder])


def asked(*loras, method="merge", **changes):
    return laws.request(method, *loras, **({"sampler": "euler", "steps": 10, "windows": "both"} | changes))


def schedules(request):
    return {name: (lora.start, lora.end) for name, lora in zip(request.names, request.loras, strict=True)}


def test_every_category_has_its_part_of_the_steps(engine):
    request, _ = engine.settle(asked(*map(Lora, (*CATEGORIES, "plain"))))
    content = dict.fromkeys(("character", "object", "clothing", "place", "pose"), CONTENT)
    assert schedules(request) == content | {"style": STYLE, "other": (0.0, 1.0), "plain": (0.0, 1.0)}
    assert request.windows == "both" and engine.settle(request)[0] == request


def test_style_late_alone(engine):
    """Content stays on in all steps, and is not noted."""
    request, _ = engine.settle(asked(*map(Lora, (*CATEGORIES, "plain")), windows="style"))
    assert schedules(request) == dict.fromkeys((*CATEGORIES, "plain"), (0.0, 1.0)) | {"style": STYLE}
    assert engine.settle(request)[0] == request
    notes = engine.run(asked(Lora("character"), Lora("style"), Lora("plain"), windows="style")).notes["windows"]
    assert notes == {"style": list(STYLE), "plain": "its category is neither content nor style"}


def test_the_requests_category_goes_before_the_files(engine):
    request, _ = engine.settle(asked(Lora("style", category="object"), Lora("plain", category="style"), Lora("character", category="other")))
    assert list(schedules(request).values()) == [CONTENT, STYLE, (0.0, 1.0)]


def test_a_schedule_of_its_own_stays(engine):
    loras = [Lora("style", end=0.5), Lora("character", start=0.1), Lora("object", weight=0.0), Lora("object", start=0.2, end=0.9)]
    request, _ = engine.settle(asked(*loras))
    assert [(lora.start, lora.end) for lora in request.loras] == [(lora.start, lora.end) for lora in loras]


def test_without_it_nothing_is_scheduled(engine):
    request, _ = engine.settle(asked(Lora("style"), Lora("character"), windows=""))
    assert set(schedules(request).values()) == {(0.0, 1.0)} and not windows.noted(request, {})


@pytest.mark.parametrize("steps, content, style", [(10, range(7), range(3, 10)), (4, range(3), range(2, 4)), (2, range(2), range(1, 2)), (1, range(1), range(1))])
def test_which_steps_those_are(steps, content, style, engine):
    """On while start <= step / steps < end; a single step is for all."""
    request, _ = engine.settle(asked(Lora("character"), Lora("style"), steps=steps))
    live = [[name for name, lora in request.active.items() if lora.weight_at(index, steps)] for index in range(steps)]
    assert live == [["character"] * (index in content) + ["style"] * (index in style) for index in range(steps)]


@pytest.mark.parametrize("method", methods.all())
def test_off_is_as_if_it_were_not_there(method, engine):
    """In the first steps the style is not there, in the last ones the content; between them both are, as ever."""
    pair = [Lora("character", binds="the fox", region=(0.0, 0.0, 0.5, 1.0)), Lora("style", binds="the owl", region=(0.5, 0.0, 1.0, 1.0))]
    request = asked(*pair, method=method, options=laws.LIGHT.get(method, {}))
    settled, _ = engine.settle(request)
    for index, live in ((0, settled.loras[:1]), (5, settled.loras), (9, settled.loras[1:])):
        expected = replace(settled, loras=[replace(lora, start=0.0, end=1.0) for lora in live], windows="")
        laws.same(laws.prediction(engine, request, index), laws.prediction(engine, expected, index))


def test_what_was_done_is_noted(engine):
    """By name the part of the steps, or why there is none; whether the request was settled before or not."""
    request = asked(*map(Lora, ("character", "style", "plain", "other")), Lora("pose", end=0.5), Lora("object", weight=0.0))
    note = engine.run(request).notes["windows"]
    assert note["character"] == list(CONTENT) and note["style"] == list(STYLE) and set(note) == {"character", "style", "plain", "other"}
    assert "category" in note["plain"] and note["plain"] == note["other"]
    assert engine.run(engine.settle(request)[0]).notes["windows"] == note
    assert "single step" in engine.run(replace(request, steps=1)).notes["windows"]["style"]
    assert "windows" not in engine.run(asked(Lora("pose", end=0.5))).notes
    assert "windows" not in engine.run(replace(request, windows="")).notes


def test_they_go_with_an_anchor(engine):
    """Where a LoRA is off in both rows: only the base is left of a step before the first one is on."""
    request = asked(Lora("style"), anchored=True, negative="an owl")
    with laws.opened(engine, request) as (run, times, start):
        early, late = (run.denoise(Step(index, 10, times[index], start)) for index in (0, 9))
    with laws.opened(engine, asked(negative="an owl")) as (run, times, start):
        laws.same(early, run.denoise(Step(0, 10, times[0], start)))
        base = run.denoise(Step(9, 10, times[9], start))
    laws.same(late[0], base[0])
    laws.differ(late[1], base[1])


# the record --------------------------------------------------------------------------------------------------------------


def test_a_record_has_both_and_makes_the_same_bytes(engine, tmp_path):
    """The flags, and the steps that they came to; the picture made again from it is the same file."""
    result = engine.run(asked(Lora("character"), Lora("style"), anchored=True))
    path = record.save(result, tmp_path / "first")
    request = record.read(path)
    assert request.anchored and request.windows and schedules(request) == {"character": CONTENT, "style": STYLE}
    again = record.save(engine.run(replace(request, model="toy")), tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()
    line = json.loads((tmp_path / "first" / record.MANIFEST).read_text())
    assert Request.read(line["request"]).windows and record.details(path).notes["windows"] == result.notes["windows"]


def test_records_without_them_are_as_they_were(engine):
    """Read, and written: the JSON of a request that has neither, and so a batch's name for its picture, is what it always was."""
    plain = Request("a fox", loras=[Lora("plain")], steps=2)
    fields = json.loads(plain.json())
    assert not {"anchored", "windows"} & set(fields)
    assert Request.read(json.dumps(fields)) == plain and not plain.anchored and not plain.windows
    identity = Identity(engine)
    names = set()
    for changes in ({}, {"anchored": True}, {"windows": "both"}, {"anchored": True, "windows": "both"}):
        other = replace(plain, **changes)
        assert Request.read(other.json()) == other
        names.add(identity.of(engine.settle(other)[0]))
    assert len(names) == 4


def test_only_yes_or_no():
    with pytest.raises(ValueError, match="anchored"):
        Request("a fox", anchored="perhaps")
