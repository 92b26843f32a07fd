"""`--control` becomes a Condition, or one plain sentence; `medley annotate` shows what an annotator makes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from app import remarks
from app.cli import flags
from composition import Condition, Refused, Request, bundled, pictures, record
from composition.annotators import ANNOTATORS, annotate
from tests.toys import condition

JSON = '{"source": "canny", "image": "a.png", "annotator": "scribble", "strength": 0.5, "start": 0.1, "end": 0.6}'


def photo(path: Path, ground: str = "navy") -> Path:
    picture = Image.new("RGB", (60, 40), ground)
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
    image = flags.control(json.dumps(fields)).image
    assert pictures.origin(image) == "a.png" and str(tmp_path) not in image
    black = (np.asarray(annotate("hole", pictures.condition(image, "fill"))) == 0).all(-1)
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


# pictures under control ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    """A folder with two condition LoRAs for the bundled FLUX."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("nets")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(bundled.path(bundled.BUNDLES["pocket-flux"].model) / "transformer"))
    condition(transformer, folder / "edges.safetensors", kind="spatial", size=32, annotator="canny")
    condition(transformer, folder / "figure.safetensors", seed=1, kind="subject", size=32)
    return folder


@pytest.fixture
def make(medley, nets, tmp_path):
    """`medley generate "a fox"` on the bundled FLUX in two steps; more arguments after it."""
    photo(tmp_path / "me.png")

    def call(*more: object, command: str = "generate", prompt: tuple = ("a fox",)):
        return medley(command, *prompt, "--model", "pocket-flux", "--lora-dir", nets, "--steps", 2, *more)

    return call


def test_a_picture_under_control_is_made_again_from_its_record(make, tmp_path, nets):
    said = make("--seed", 5, "--control", "edges=me.png:0.8", "--control", '{"source": "figure", "image": "me.png", "end": 0.5}')
    assert said.code == 0, said.err
    assert "edges by me.png through canny, strength 0.8" in said.out and "edges: applied" in said.out
    assert "figure by me.png, strength 1, from 0% to 50% of the steps" in said.out
    kept = record.details(Path("pictures/0000.png"))
    first, second = kept.request.conditions
    assert (first.source, first.annotator, first.strength, second.annotator) == ("edges", "canny", 0.8, "")
    assert (np.asarray(pictures.condition(first.image)) == np.asarray(Image.open("me.png"))).all()
    assert set(kept.condition_receipts) == {"edges", "figure"} and str(tmp_path).encode() not in Path("pictures/0000.png").read_bytes()
    Path("me.png").unlink()
    said = make("--from", "pictures/0000.png", "--out", "again", prompt=())
    assert said.code == 0, said.err
    assert Path("again/0000.png").read_bytes() == Path("pictures/0000.png").read_bytes()
    photo(tmp_path / "other.png", "white")
    assert make("--from", "pictures/0000.png", "--out", "other", "--control", "edges=other.png", prompt=()).code == 0
    assert [each.source for each in record.read(Path("other/0000.png")).conditions] == ["edges"]
    assert Image.open("other/0000.png").tobytes() != Image.open("again/0000.png").tobytes()


def test_strength_zero_is_no_condition(make):
    assert make("--seed", 5, "--out", "bare").code == 0 and make("--seed", 5, "--control", "edges=me.png:0", "--out", "zero").code == 0
    assert Image.open("bare/0000.png").tobytes() == Image.open("zero/0000.png").tobytes()
    said = make("--seed", 5, "--control", "edges=me.png", "--out", "on", "--json").json
    assert Image.open("on/0000.png").tobytes() != Image.open("bare/0000.png").tobytes()
    assert said["request"]["conditions"][0]["annotator"] == "canny" and set(said["condition_receipts"]) == {"edges"}


def test_compare_keeps_the_condition_on_in_every_picture(make):
    said = make("--lora", "raccoon", "--methods", "merge,switch", "--seed", 1, "--control", "edges=me.png", command="compare")
    assert said.code == 0, said.err
    assert "No LoRA" in said.out and "edges by me.png through canny, strength 1" in said.out
    for way in ("prompt", "merge", "switch"):
        assert [each.source for each in record.read(Path(f"pictures/compare-0000-{way}.png")).conditions] == ["edges"]


def test_batch_reads_conditions_and_goes_on_where_it_was(medley, nets, tmp_path):
    photo(tmp_path / "me.png")
    lines = [{"prompt": "a fox", "steps": 1, "seed": seed, "conditions": [{"source": "edges", "image": image}]} for seed, image in ((1, "me.png"), (2, "no.png"))]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ("batch", "lines.jsonl", "--model", "pocket-flux", "--lora-dir", nets, "--out", "b")
    said = medley(*common)
    assert said.code == 3 and "line 2: the picture of condition edges cannot be used: no.png is not there" in said.err
    assert "1 pictures in" in said.out and "1 made now" in said.out
    assert "0 made now" in medley(*common).out
    photo(tmp_path / "me.png", "white")  # another picture of the same name is another request
    assert "1 made now" in medley(*common).out
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/edges.safetensors").write_bytes((nets / "figure.safetensors").read_bytes())  # and so is another file of the same name
    assert "1 made now" in medley(*common[:4], "--lora-dir", tmp_path / "nets", *common[6:]).out


@pytest.mark.parametrize(("control", "what"), [
    ("edge=me.png", "did you mean 'edges'"), ("edges=none.png", "none.png is not there"), ("edges=one.png", "condition edges: there are no edges"),
    ('{"source": "edges", "image": "me.png", "annotator": "cany"}', "did you mean 'canny'"), ("raccoon=me.png", "raccoon")])
def test_what_cannot_control_is_refused_in_one_line(make, tmp_path, control, what):
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "one.png")
    said = make("--control", control)
    assert said.code == 2 and what in said.err and said.err.count("\n") == 1 and not list(tmp_path.glob("pictures/*.png"))


def test_a_record_names_conditions_of_the_folders_alone(make, medley, nets, tmp_path):
    assert make("--seed", 1, "--control", "edges=me.png").code == 0
    (tmp_path / "edges.safetensors").write_bytes((nets / "edges.safetensors").read_bytes())
    common = ("generate", "--from", "pictures/0000.png", "--model", "pocket-flux", "--out", "x")
    said = medley(*common)
    assert said.code == 2 and "lies in no folder of LoRAs" in said.err
    assert medley(*common, "--allow-paths").code == 0


def test_another_file_of_the_same_name_is_noted(make, nets, tmp_path, medley):
    assert make("--seed", 1, "--control", "edges=me.png").code == 0
    (tmp_path / "others").mkdir()
    (tmp_path / "others/edges.safetensors").write_bytes((nets / "figure.safetensors").read_bytes())
    said = medley("generate", "--from", "pictures/0000.png", "--model", "pocket-flux", "--lora-dir", tmp_path / "others", "--out", "x")
    assert said.code == 0 and "condition edges is not the file it was made with" in said.err and "picture will differ" in said.err


def test_what_reads_pictures_is_listed_and_inspected(medley, nets):
    said = medley("loras", "--model", "pocket-flux", "--lora-dir", nets)
    assert [line.split() for line in said.out.splitlines() if line.startswith(("edges", "figure"))] == [
        ["edges", "condition", "LoRA", "spatial", "canny"], ["figure", "condition", "LoRA", "subject"]]
    rows = {row["name"]: row for row in medley("loras", "--model", "pocket-flux", "--lora-dir", nets, "--json").json}
    assert rows["edges"] == {"name": "edges", "path": str(nets / "edges.safetensors"), "control": "condition LoRA", "kind": "spatial", "annotator": "canny"}
    assert "control" not in rows["raccoon"]
    for words in (("edges", "--lora-dir", nets), (nets / "edges.safetensors",)):
        said = medley("inspect", *words)
        assert said.code == 0 and "--control edges=PICTURE; its picture is spatial, drawn by annotator canny" in said.out
    assert medley("inspect", nets / "figure.safetensors", "--json").json["kind"] == "subject"


def test_a_condition_lora_given_as_a_lora_says_how_it_is_given(make):
    said = make("--lora", "edges")
    assert said.code == 2 and "of a condition LoRA, which goes with a picture: --control NAME=PICTURE" in said.err


@pytest.mark.parametrize("source", ["canny", "controlnet-canny", "FOLDER", "FILE"])
def test_a_controlnet_given_as_a_lora_says_how_it_is_given(medley, source):
    folder = bundled.path("pocket128/controlnet-canny")
    source = {"FOLDER": folder, "FILE": folder / "diffusion_pytorch_model.safetensors"}.get(source, source)
    said = medley("generate", "a fox", "--lora", source)
    assert said.code == 2 and f"is a ControlNet, which goes with a picture: --control {source}=PICTURE" in said.err


def test_a_bundled_name_of_a_condition_lora_given_as_a_lora(medley):
    said = medley("generate", "a fox", "--model", "pocket-flux", "--lora", "canny")
    assert said.code == 2 and "'canny' is a condition LoRA, which goes with a picture: --control canny=PICTURE" in said.err


def test_controlnets_and_control_loras_are_inspected(medley, tmp_path):
    assert "a ControlNet: --control canny=PICTURE; its picture is spatial, drawn by annotator canny" in medley("inspect", "canny").out
    weights = {f"transformer.x_embedder.lora_{side}.weight": torch.zeros(size) for side, size in (("A", (4, 128)), ("B", (64, 4)))}
    save_file(weights, tmp_path / "depth.safetensors")
    for words in (("depth", "--lora-dir", tmp_path), (tmp_path / "depth.safetensors",)):
        read = medley("inspect", *words, "--model", "pocket-flux", "--json").json
        assert (read["control"], read["tensors"], read["family"]) == ("control LoRA", 2, "flux")
    listed = {row["name"]: row for row in medley("loras", "--model", "pocket-flux", "--lora-dir", tmp_path, "--json").json}
    assert listed["depth"]["control"] == "control LoRA" and listed["canny"]["control"] == "condition LoRA"
