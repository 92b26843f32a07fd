"""Annotators: what each draws, by references of its own, on pictures of every kind; and the door through which those pictures come."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from composition import Refused, pictures
from composition.annotators import ANNOTATORS, annotate, plugins

WEIGHTLESS = [name for name, annotator in ANNOTATORS.items() if not annotator.extra]
DRAWN = [name for name in WEIGHTLESS if name != "hole"]


def scene(width: int = 160, height: int = 120, low: int = 40, high: int = 200) -> Image.Image:
    """A disc and a bar on a ground: two shapes whose outlines are known."""
    y, x = np.mgrid[:height, :width]
    inside = ((x - 50) ** 2 + (y - 60) ** 2 < 30**2) | ((x > 110) & (x < 130) & (y > 20) & (y < 100))
    return Image.fromarray(np.where(inside, high, low).astype(np.uint8)).convert("RGB")


def outline(picture: Image.Image, within: int) -> np.ndarray:
    """Pixels at most so many steps from a pixel whose right or lower neighbour has another colour."""
    grey = np.asarray(picture.convert("L"), int)
    edge = np.zeros(grey.shape, bool)
    edge[:, :-1] |= grey[:, 1:] != grey[:, :-1]
    edge[:-1] |= grey[1:] != grey[:-1]
    for _ in range(within):
        wide = np.pad(edge, 1)
        edge = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:] | edge
    return edge


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("size", [(160, 120), (64, 64), (8, 200), (33, 9)])
def test_the_size_and_the_mode_stay(name, size):
    noise = Image.effect_noise(size, 90).convert("RGB")
    before = noise.tobytes()
    made = annotate(name, noise)
    assert (made.size, made.mode) == (size, "RGB") and noise.tobytes() == before


def test_canny_draws_the_outlines_thin_and_nothing_else():
    lines = np.asarray(annotate("canny", scene()))
    assert set(np.unique(lines)) == {0, 255} and (lines[..., 0] == lines[..., 2]).all()
    drawn = lines[..., 0] == 255
    assert not (drawn & ~outline(scene(), 1)).any()  # only there
    near = np.pad(drawn, 1)
    near = near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:] | drawn
    assert (near & outline(scene(), 0)).sum() > 0.95 * outline(scene(), 0).sum()  # and nearly all of it
    assert drawn.sum() < 1.5 * outline(scene(), 0).sum()  # one pixel wide


@pytest.mark.parametrize(("low", "high"), [(0, 30), (220, 250), (10, 240), (100, 112)])
def test_lines_do_not_depend_on_light(low, high):
    """The same scene darker, lighter, stronger or fainter has the same edges, and scribbles in the same places."""
    usual, other = ((np.asarray(annotate(name, picture))[..., 0] > 127) for picture in (scene(), scene(low=low, high=high)) for name in ("canny",))
    assert (usual == other).mean() > 0.999
    usual, other = ((np.asarray(annotate("scribble", picture))[..., 0] > 127) for picture in (scene(), scene(low=low, high=high)))
    assert (usual & other).sum() > 0.9 * (usual | other).sum()


def test_an_edge_between_colours_of_one_lightness_is_an_edge():
    red_green = np.zeros((64, 64, 3), np.uint8)
    red_green[:, :32], red_green[:, 32:] = (0, 100, 0), (196, 0, 0)  # both of lightness 59 as Pillow counts it
    picture = Image.fromarray(red_green)
    assert len(set(np.asarray(picture.convert("L")).ravel())) == 1
    lines = np.asarray(annotate("canny", picture))[..., 0]
    assert (lines[4:-4].max(axis=1) == 255).all() and not lines[:, :28].any() and not lines[:, 36:].any()


def test_noise_that_nobody_sees_is_no_line():
    noisy = np.asarray(scene(), int) + np.random.default_rng(0).integers(-2, 3, (120, 160, 3))
    drawn = np.asarray(annotate("canny", Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))[..., 0] > 0
    assert (drawn & ~outline(scene(), 2)).sum() == 0


def test_scribbles_are_soft_and_thicker_than_edges():
    soft, thin = (np.asarray(annotate(name, scene(640, 480)))[..., 0] for name in ("scribble", "canny"))
    assert len(np.unique(soft)) > 50 and (soft > 127).sum() > 3 * (thin > 127).sum()
    assert not soft[~outline(scene(640, 480), 20)].any()


def test_tones_against_references():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8))
    colours = np.asarray(picture, float)
    grey = np.asarray(annotate("grey", picture), float)
    assert np.abs(grey - (colours @ [0.299, 0.587, 0.114])[..., None]).max() < 1
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(colours, (2.4, 2.4, 0), mode="mirror")
    assert np.abs(np.asarray(annotate("blur", picture), float) - blurred)[12:-12, 12:-12].max() < 3
    blocks = colours.reshape(15, 8, 20, 8, 3).mean((1, 3))
    tiled = np.asarray(annotate("tile", picture), float)
    assert np.abs(tiled.reshape(15, 8, 20, 8, 3).mean((1, 3)) - blocks).mean() < 6
    assert tiled.std() < 0.5 * colours.std()


def test_a_hole_is_black_and_the_rest_stays():
    picture, hole = scene(), Image.new("L", (160, 120))
    hole.paste(255, (40, 30, 80, 90))
    made = np.asarray(annotate("hole", pictures.with_hole(picture, hole)))
    inside = np.asarray(hole) == 255
    assert not made[inside].any() and (made[~inside] == np.asarray(picture)[~inside]).all()
    small = np.asarray(annotate("hole", pictures.with_hole(picture, hole.resize((16, 12), Image.Resampling.NEAREST))))
    assert ((small == 0).all(-1) == inside).mean() > 0.98  # a mask of another size is stretched


@pytest.mark.parametrize(("picture", "what"), [
    (scene(), "has no hole"), (pictures.with_hole(scene(), Image.new("L", (4, 4))), "nowhere"),
    (pictures.with_hole(scene(), Image.new("L", (4, 4), 250)), "everywhere")])
def test_a_picture_without_a_hole_is_refused(picture, what):
    with pytest.raises(Refused, match=what):
        annotate("hole", picture)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (90, 20, 200)])
def test_a_picture_of_one_colour_has_tones_and_no_lines(colour):
    picture = Image.new("RGB", (64, 48), colour)
    for name in ("canny", "scribble"):
        with pytest.raises(Refused, match="of one colour"):
            annotate(name, picture)
    for name in ("blur", "tile", ""):
        assert (np.asarray(annotate(name, picture)) == colour).all()


def test_a_large_picture_is_annotated_at_the_size_of_what_it_controls():
    """Its edges are one pixel wide there, where those of the large one would fade into grey."""
    large, small = scene(640, 480), (64, 48)
    for size, fitted in (((64, 48), (64, 48)), ((64, 64), (86, 64)), ((30, 48), (64, 48)), ((400, 400), (534, 400)), ((4000, 3000), (640, 480))):
        assert annotate("canny", large, size).size == fitted
    assert (np.asarray(annotate("canny", large, small)) == np.asarray(annotate("canny", large.resize(small, Image.Resampling.BOX)))).all()


def test_an_unknown_annotator_is_refused_with_the_nearest():
    with pytest.raises(Refused, match="no annotator is named 'cany'; did you mean 'canny'"):
        annotate("cany", scene())
    with pytest.raises(Refused, match="there are canny, scribble, grey, blur, tile, "):
        annotate("x", scene())


# the door ---------------------------------------------------------------------------------------------------------------


def saved(folder, picture: Image.Image, name: str = "photo.png", **more) -> str:
    picture.save(folder / name, **more)
    return str(folder / name)


def test_a_turned_photo_comes_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    path = saved(tmp_path, scene(), "photo.jpg", exif=exif, quality=95)
    upright = np.rot90(np.asarray(scene(), float), -1)
    assert np.abs(np.asarray(pictures.condition(path, "canny"), float) - upright).mean() < 3
    assert np.abs(np.asarray(pictures.condition(pictures.condition_as_text(path, "canny"), "canny"), float) - upright).mean() < 3


@pytest.mark.parametrize(("size", "fitted"), [((3000, 1500), (1024, 512)), ((1500, 3000), (512, 1024)), ((1024, 100), (1024, 100)), ((20, 9), (20, 9))])
def test_a_huge_picture_is_made_smaller_and_none_is_enlarged(tmp_path, size, fitted):
    assert pictures.condition(saved(tmp_path, Image.new("RGB", size, "teal")), "canny").size == fitted


KINDS = {
    "grey of 16 bits": (Image.fromarray(np.full((9, 9), 257 * 100, np.uint16)), (100, 100, 100)),
    "grey": (Image.new("L", (9, 9), 100), (100, 100, 100)), "black and white": (Image.new("1", (9, 9), 1), (255, 255, 255)),
    "palette": (Image.new("RGB", (9, 9), (10, 200, 30)).quantize(4), (10, 200, 30)),
    "opaque": (Image.new("RGBA", (9, 9), (10, 200, 30, 255)), (10, 200, 30)), "grey with alpha": (Image.new("LA", (9, 9), (90, 255)), (90, 90, 90)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_colour_of_8_bits(kind, tmp_path):
    picture, colour = KINDS[kind]
    opened = pictures.condition(saved(tmp_path, picture), "canny")
    assert opened.mode == "RGB" and np.abs(np.asarray(opened, int) - colour).max() <= 2


def test_colour_of_16_bits(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "deep.png"), np.full((9, 9, 3), (257 * 30, 257 * 20, 257 * 10), np.uint16))
    assert (np.asarray(pictures.condition(str(tmp_path / "deep.png"), "canny")) == (10, 20, 30)).all()


def test_a_printers_picture(tmp_path):
    opened = pictures.condition(saved(tmp_path, Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "x.jpg"), "canny")
    assert opened.mode == "RGB" and np.abs(np.asarray(opened, int) - (255, 0, 0)).max() < 40


@pytest.mark.parametrize(("light", "ground"), [(20, 255), (150, 255), (200, 0), (255, 0)])
def test_what_is_transparent_gets_a_ground_that_sets_the_rest_off(light, ground, tmp_path):
    """A drawing in white lines, as annotators make them, keeps its lines; a dark figure stands on white."""
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    picture.paste((light, light, light, 255), (10, 10, 30, 30))
    opened = pictures.condition(saved(tmp_path, picture), "canny")
    assert opened.mode == "RGBA"
    flat = np.asarray(annotate("", opened))
    assert (flat[20, 20] == light).all() and (flat[0, 0] == ground).all()
    assert np.asarray(annotate("canny", opened)).any()


PALE = Image.new("RGBA", (9, 9), (255, 0, 0, 0))


@pytest.mark.parametrize(("content", "what"), [
    (Image.new("RGB", (9, 7)), "at least 8"), (Image.new("RGB", (4000, 20)), "1024x5"), (PALE, "transparent everywhere"), (b"hello", "cannot be read"),
    (b"GIF89a\1\0\1\0\0\0\0;", "no PNG, JPEG, WEBP or BMP"), (None, "is not there")])  # fmt: skip
def test_what_no_condition_can_use_is_refused_by_its_name(content, what, tmp_path):
    if isinstance(content, Image.Image):
        content.save(tmp_path / "photo.png")
    elif content is not None:
        (tmp_path / "photo.png").write_bytes(content)
    for read in (pictures.condition, pictures.condition_as_text):
        with pytest.raises(Refused, match=f"^the picture of condition canny .*{what}"):
            read(str(tmp_path / "photo.png"), "canny")


def test_a_bomb_is_refused_unread(tmp_path):
    from tests.composition.test_door import BROKEN

    for name in ("bomb", "large"):
        (tmp_path / "x.png").write_bytes(BROKEN[name])
        with pytest.raises(Refused, match="make it smaller"):
            pictures.condition(str(tmp_path / "x.png"), "canny")


# as text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", [scene(), annotate("canny", scene()), pictures.with_hole(scene(), scene().convert("L").point(lambda level: 255 * (level > 100)))])
def test_text_is_the_same_picture_with_its_files_name_alone(picture, tmp_path):
    text = pictures.condition_as_text(saved(tmp_path, picture, "a photo;1,2.png"), "canny")
    assert text.startswith("data:image/png;name=a%20photo%3B1%2C2.png;base64,")
    again = pictures.condition(text, "canny")
    assert again.mode == picture.mode and (np.asarray(again) == np.asarray(picture)).all()
    assert pictures.condition_as_text(text, "canny") == text and pictures.origin(text) == "a photo;1,2.png"


@pytest.mark.parametrize("clear", [False, True])
def test_a_photo_is_kept_small_and_stays_what_it_is(clear, tmp_path):
    y, x = np.mgrid[:600, :800]
    rough = np.random.default_rng(0).normal(0, 12, (600, 800, 1)) + np.stack([x / 4, y / 3, 255 - x / 4], -1)
    photo = Image.fromarray(rough.clip(0, 255).astype(np.uint8))
    if clear:
        photo.putalpha(Image.fromarray(np.where(x > 400, 0, 255).astype(np.uint8)))
    text = pictures.condition_as_text(saved(tmp_path, photo), "canny")
    assert text.startswith("data:image/webp;name=photo.png;base64,") and len(text) < 600_000
    again = pictures.condition(text, "canny")
    assert again.size == (800, 600) and again.mode == ("RGBA" if clear else "RGB")
    assert np.abs(np.asarray(pictures.opaque(again), float) - np.asarray(pictures.opaque(photo), float)).mean() < 6
    assert pictures.condition_as_text(text, "canny") == text


def data(picture: Image.Image, kind: str = "png", name: str = "") -> str:
    stream = io.BytesIO()
    picture.save(stream, format=kind.upper())
    return f"data:image/{kind}{f';name={name}' if name else ''};base64,{base64.b64encode(stream.getvalue()).decode()}"


def test_folders_leave_the_text():
    for path in ("/home/me/photo.png", "C:%5CUsers%5CEve%5Cphoto.png", "%2Fhome%2Fme%2Fphoto.png"):
        text = pictures.condition_as_text(data(scene(), name=path), "canny")
        assert text.startswith("data:image/png;name=photo.png;base64,") and pictures.origin(text) == "photo.png"
    assert pictures.origin(r"C:\photos\a.png") == pictures.origin("photos/a.png") == "a.png" and pictures.origin(data(scene())) == ""
    assert pictures.condition_as_text(data(Image.new("RGB", (2000, 1000)), "jpeg"), "x") == pictures.condition_as_text(
        data(Image.new("RGB", (1024, 512))), "x")


@pytest.mark.parametrize("text", ["data:image/png;base64,%%%", "data:image/png;base64,aGVsbG8=", "data:text/html,x", "data:image/png;base64,",
                                  "data:image/svg+xml;base64,PHN2Zy8+", "data:image/gif;base64,R0lGODlhAQABAAAAADs=", "data:", data(scene())[:-60]])
def test_text_that_is_no_picture_is_refused(text):
    with pytest.raises(Refused, match="the picture of condition canny cannot be used"):
        pictures.condition_as_text(text, "canny")


# annotators with a network ------------------------------------------------------------------------------------------------

NETWORKS = [name for name, annotator in ANNOTATORS.items() if annotator.extra]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_not_installed_is_refused_with_what_to_install(name, monkeypatch):
    monkeypatch.setattr(plugins, "DEPTH", "nobody/no-such-model")
    with pytest.raises(Refused, match=f"annotator {name} needs .*as it is"):
        annotate(name, scene())
    assert ANNOTATORS[name].licence and ANNOTATORS[name].extra


def test_a_package_offers_an_annotator(monkeypatch):
    class Entry:
        load = staticmethod(lambda: lambda picture: picture.convert("L").resize((8, 8)))

    monkeypatch.setattr(plugins, "entry_points", lambda group, name: [Entry] if (group, name) == ("medley.annotators", "pose") else [])
    drawn = annotate("pose", scene())
    assert (drawn.size, drawn.mode) == ((160, 120), "RGB")
    Entry.load = staticmethod(lambda: lambda picture: "x")
    with pytest.raises(Refused, match="made no picture but a str"):
        annotate("pose", scene())


def test_depth_by_a_toy_of_its_class(tmp_path, monkeypatch):
    """The code around the network, on one of random weights; the real one was not run."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    eye = Dinov2Config(image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, reshape_hidden_states=False,
                       out_features=["stage1", "stage2", "stage3", "stage4"])
    torch.manual_seed(0)
    net = DepthAnythingForDepthEstimation(DepthAnythingConfig(
        backbone_config=eye, reassemble_hidden_size=16, neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8, head_hidden_size=4, patch_size=14))
    net.save_pretrained(tmp_path)
    DPTImageProcessor(size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True).save_pretrained(tmp_path)
    monkeypatch.setattr(plugins, "_folder", lambda repository: str(tmp_path))
    drawn = np.asarray(annotate("depth", scene()))
    assert drawn.shape == (120, 160, 3) and (drawn.min(), drawn.max()) == (0, 255) and (drawn[..., 0] == drawn[..., 2]).all()
    (tmp_path / "model.safetensors").unlink()
    plugins._depth_model.cache_clear()
    with pytest.raises(Refused, match="cannot be opened"):
        annotate("depth", scene())
