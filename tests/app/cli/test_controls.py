"""`--control` becomes a Condition, or one plain sentence; `medley annotate` shows what an annotator makes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from app import remarks
from app.cli import flags
from composition import Condition, Refused, Request, pictures
from composition.annotators import ANNOTATORS, annotate

JSON = '{"source": "canny", "image": "a.png", "annotator": "scribble", "strength": 0.5, "start": 0.1, "end": 0.6}'


def photo(path: Path) -> Path:
    picture = Image.new("RGB", (60, 40), "navy")
    ImageDraw.Draw(picture).ellipse((10, 5, 40, 35), fill="gold")
    picture.save(path)
    return path


@pytest.mark.parametrize(("text", "source", "image", "strength"), [
    ("canny=photo.png", "canny", "photo.png", 1.0),
    ("canny=photo.png:0.8", "canny", "photo.png", 0.8),
    ("canny = photo.png : .5", "canny", "photo.png", 0.5),
    ("canny=photo.png:0", "canny", "photo.png", 0.0),
    ("canny=photos/me.jpg:1e-1", "canny", "photos/me.jpg", 0.1),
    (r"canny=C:\photos\me.png", "canny", r"C:\photos\me.png", 1.0),
    (r"canny=C:\photos\me.png:0.8", "canny", r"C:\photos\me.png", 0.8),
    ("canny=C:/photos/me.png:2", "canny", "C:/photos/me.png", 2.0),
    (r"D:\loras\canny.safetensors=C:\me.png:0.3", r"D:\loras\canny.safetensors", r"C:\me.png", 0.3),
    ("nets/controlnet-canny=a=b.png:0.3", "nets/controlnet-canny", "a=b.png", 0.3),
    ("canny=data:image/png;base64,aGVs/bG8=", "canny", "data:image/png;base64,aGVs/bG8=", 1.0),
    ("canny=data:image/png;base64,aGVs/bG8=:0.4", "canny", "data:image/png;base64,aGVs/bG8=", 0.4),
    ('{"source": "canny", "image": "a.png", "strength": 0.4}', "canny", "a.png", 0.4),
])
def test_control(text, source, image, strength):
    assert flags.control(text) == Condition(source, image, strength=strength)


def test_control_json_reaches_every_field():
    assert flags.control(JSON) == Condition("canny", "a.png", annotator="scribble", strength=0.5, start=0.1, end=0.6)


def test_a_file_with_a_colon_and_a_number_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "a.png").rename(tmp_path / "at 12:30")
    assert flags.control("canny=at 12:30") == Condition("canny", "at 12:30")


@pytest.mark.parametrize(("text", "what"), [
    ("", "NAME=PICTURE"), ("canny", "NAME=PICTURE"), ("photo.png:0.8", "NAME=PICTURE"), ("=photo.png", "NAME=PICTURE"), ("canny=", "NAME=PICTURE"),
    ("canny=photo.png:", "is not a number"), ("canny=photo.png:much", "'much' is not a number"), ("canny=photo.png:nan", "not a number"),
    ("canny=photo.png:0,5", "not a number"), ("canny=photo.png:-1", "strength: must be at least 0"), ("canny=photo.png:11", "strength: must be at most 10"),
    ("{", "JSON"), ('{"source": "canny"}', '"image" is missing'), ('{"image": "a.png"}', '"source" is missing'),
    (JSON.replace("0.5", '"x"'), "strength: must be a number"), (JSON.replace("start", "begin"), "begin: is no field"),
    (JSON.replace("0.6", "0.05"), "must lie before end"), (JSON.replace("0.6", "1.6"), "end: must be at most 1"),
    ('{"source": "canny", "image": "a.png", "mask": 3}', "mask: must be the path"),
])
def test_control_refused_naming_what_was_given(text, what):
    with pytest.raises(Refused, match=f"^--control.*{what}"):
        flags.control(text)


def test_a_mask_makes_the_hole(tmp_path):
    photo(tmp_path / "a.png")
    Image.new("L", (60, 40)).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        mask.paste(255, (20, 10, 40, 30))
        mask.save(tmp_path / "mask.png")
    fields = {"source": "fill", "image": str(tmp_path / "a.png"), "mask": str(tmp_path / "mask.png"), "annotator": "hole"}
    condition = flags.control(json.dumps(fields))
    assert pictures.origin(condition.image) == "a.png" and str(tmp_path) not in condition.image
    black = (np.asarray(annotate("hole", pictures.condition(condition.image, "fill"))) == 0).all(-1)
    assert black[10:30, 20:40].all() and black.sum() == 400
    with pytest.raises(Refused, match="its mask.*is not there"):
        flags.control(json.dumps(fields | {"mask": str(tmp_path / "none.png")}))


def test_conditions_join_the_request_and_replace_those_of_its_start():
    start = Request(prompt="old", conditions=[Condition("depth", "a.png")])
    assert flags.request({"control": None, "steps": 3}, start)[0].conditions == start.conditions
    given, _ = flags.request({"control": ["canny=a.png:0.5", "subject=b.png"]}, start)
    assert given.conditions == (Condition("canny", "a.png", strength=0.5), Condition("subject", "b.png"))
    assert Request(prompt="", conditions=[Condition("a/canny.safetensors", "x"), Condition("canny", "y")]).condition_names == ("canny", "canny#2")


def test_controls_are_told_in_a_line_each(tmp_path):
    text = pictures.condition_as_text(str(photo(tmp_path / "me.png")), "canny")
    request = Request(prompt="", conditions=[
        Condition("canny", text, strength=0.8), Condition("canny", "photos/a.png", annotator="canny", weight=0.5),
        Condition("nets/lines", "data:image/png;base64,aGVs", annotator="scribble", start=0.2, end=0.75), Condition("x\x1b[31m", "b\x1b[0m.png")])
    lines = remarks.controls(request)
    assert lines[:3] == ["canny by me.png, strength 0.8", "canny#2 by a.png, strength 1, weight 0.5",
                         "lines by a picture through scribble, strength 1, from 20% to 75% of the steps"]
    assert "\x1b" not in lines[3]


@pytest.mark.parametrize("flag", ["--controlnet", "--control-image", "--image"])
def test_another_tools_flag_leads_to_ours(medley, flag):
    said = medley("generate", "a fox", flag, "x")
    assert said.code == 2 and "--control NAME=PICTURE:STRENGTH" in said.err


# annotate ---------------------------------------------------------------------------------------------------------------


def test_annotate_writes_what_each_makes(medley, tmp_path):
    photo(tmp_path / "me.png")
    for number in (0, 1):
        said = medley("annotate", "me.png", "--with", "canny", "--with", "grey", "--out", "made")
        assert said.code == 0, said.err
        for name in ("canny", "grey"):
            path = tmp_path / f"made/me-{name}-000{number}.png"
            assert f"{Path('made') / path.name}  {name}: " in said.out
            with Image.open(path) as drawn:
                assert drawn.tobytes() == annotate(name, pictures.condition(str(tmp_path / "me.png"))).tobytes()
    assert (tmp_path / "me.png").exists() and len(list((tmp_path / "made").iterdir())) == 4


def test_annotate_paints_the_hole_of_a_mask(medley, tmp_path):
    photo(tmp_path / "me.png")
    Image.new("L", (30, 20), 0).save(tmp_path / "mask.png")
    said = medley("annotate", "me.png", "--with", "hole", "--mask", "mask.png")
    assert said.code == 2 and "no hole" in said.err and not (tmp_path / "pictures").exists()
    mask = Image.new("L", (60, 40))
    mask.paste(255, (0, 0, 30, 40))
    mask.save(tmp_path / "mask.png")
    assert medley("annotate", "me.png", "--with", "hole", "--mask", "mask.png").code == 0
    with Image.open(tmp_path / "pictures/me-hole-0000.png") as drawn:
        assert (np.asarray(drawn).sum(-1) == 0).sum() == 30 * 40


@pytest.mark.parametrize(("words", "what"), [
    (("none.png", "--with", "canny"), "none.png is not there"), (("me.png", "--with", "cany"), "did you mean 'canny'"), (("me.png",), "--with"),
    (("one.png", "--with", "canny"), "no edges"), (("one.png", "--with", "grey", "--with", "scribble"), "no outlines"),
    (("me.png", "--with", "hole"), "has no hole"), (("text.png", "--with", "canny"), "cannot be read"), ((".", "--with", "canny"), "is a folder")])
def test_annotate_refuses_in_one_line_and_writes_nothing(medley, tmp_path, words, what):
    photo(tmp_path / "me.png")
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "one.png")
    (tmp_path / "text.png").write_text("hello")
    said = medley("annotate", *words)
    assert said.code == 2 and what in said.err and said.err.count("\n") == 1 and not (tmp_path / "pictures").exists()


def test_help_lists_every_annotator(medley):
    said = medley("annotate", "--help").out
    assert all(f"{name}: {of.about}" in " ".join(said.split()) for name, of in ANNOTATORS.items())
    assert "--control" in medley("generate", "--help").out and "--control" in medley("compare", "--help").out
