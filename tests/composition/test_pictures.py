"""A folder of pictures and captions: what is read, what is refused at the door and how, what the views are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from composition.refusal import Refused
from composition.training import captions, pictures

RED, BLUE = (200, 30, 30), (30, 30, 200)
SIZE = (32, 32)


@pytest.fixture
def folder(tmp_path):
    for index, ending in enumerate(("png", "jpg", "jpeg", "webp", "bmp")):
        Image.new("RGB", (60 + index, 50), RED).save(tmp_path / f"{index}.{ending}")
    (tmp_path / "notes.md").write_text("not a picture")
    return tmp_path


def read(folder, trigger="zog", category="object"):
    return pictures.read(folder, trigger, category)


def views(folder, count=0, **kwargs):
    return pictures.views(folder, "zog", "object", SIZE, count, **kwargs)


def test_every_kind_of_picture_and_plain_prompts(folder):
    found = read(folder)
    pixels, prompts = views(found, 10)
    assert pixels.shape == (10, 3, 32, 32)
    assert float(pixels.min()) >= -1 and float(pixels.max()) <= 1
    assert set(prompts) <= {"a zog", "a picture of a zog"}
    assert found.captions == {} and found.remark == ""


def test_a_picture_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (64, 64), RED)
    picture.paste(BLUE, (0, 0, 64, 32))  # blue above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels, _ = views(read(tmp_path))
    assert pixels[0, 0, 4].mean() > 0 > pixels[0, 2, 4].mean()  # red above, once turned


def test_alpha_is_laid_on_white_first_and_on_other_colours_later(tmp_path):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "a.png")
    pixels, _ = views(read(tmp_path), 40)
    assert torch.equal(pixels[0], torch.ones(3, 32, 32))
    assert 2 < len({tuple(view[:, 0, 0].tolist()) for view in pixels}) < 40
    grey = Image.new("P", (40, 40), 0)
    grey.putpalette([0, 0, 0] * 256)
    grey.save(tmp_path / "a.png", transparency=0)
    assert torch.equal(views(read(tmp_path))[0][0], torch.ones(3, 32, 32))


def test_views_cover_the_shape_flip_and_shift(tmp_path):
    ramp = np.linspace(0, 255, 120).astype(np.uint8)
    Image.fromarray(np.repeat(np.repeat(ramp[None, :, None], 60, 0), 3, 2)).save(tmp_path / "a.png")
    found = read(tmp_path)
    pixels, _ = views(found, 30)
    middle = pixels[0, 0, 16]
    assert -0.6 < float(middle[0]) < -0.4 and 0.4 < float(middle[-1]) < 0.6  # the middle 60 of 120 columns, not squeezed
    falling = [view for view in pixels if view[0, 16, 0] > view[0, 16, -1]]
    assert 5 < len(falling) < 25
    assert not any(view[0, 16, 0] > view[0, 16, -1] for view in views(found, 30, flip=False)[0])
    assert len({float(view[0, 16].sort().values[0]) for view in pixels}) > 5
    tall, _ = pictures.views(found, "zog", "object", (24, 40), 3)
    assert tall.shape == (3, 3, 40, 24)


def test_views_follow_from_the_seed(folder):
    found = read(folder)
    first, again, other = (views(found, 20, seed=seed) for seed in ("1", "1", "2"))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert first[1] != other[1]
    assert torch.equal(first[0][:5], views(found, 5, seed="1")[0])  # more views leave the first as they are


@pytest.mark.parametrize(("category", "wanted"), [
    ("character", "zog, on a chair"), ("object", "zog, on a chair"), ("style", "on a chair, zog"), ("place", "on a chair, zog")])
def test_captions_beside_the_pictures(folder, category, wanted):
    for index in range(5):
        (folder / f"{index}.txt").write_text("On a  chair.\n" if index else "A ZOG asleep", encoding="utf-8")
    found = read(folder, category=category)
    assert found.captions[0] == "A ZOG asleep"
    assert found.captions[1].lower().replace(".", "") == wanted
    assert "4 of 5 captions" in found.remark and ("end of" if category in captions.LAST else "front of") in found.remark
    assert set(views(found, 9)[1]) == set(found.captions.values())


def test_captions_in_a_table(folder):
    rows = [{"file_name": path.name, "text": f"a zog {path.stem}", "more": 1} for path in folder.iterdir() if path.suffix != ".md"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read(folder)
    assert found.captions[3] == "a zog 3" and found.remark == ""


def test_a_line_of_a_table_ends_at_a_line_feed_alone(tmp_path):
    for name in ("a\u2028b.png", "c.png"):
        Image.new("RGB", (60, 50), RED).save(tmp_path / name)
    rows = [{"file_name": "a\u2028b.png", "text": "a zog\u2029asleep"}, {"file_name": "c.png", "text": "a\x85zog"}]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read(tmp_path).captions == {0: "a zog asleep", 1: "a zog"}


def test_origin_tells_pictures_captions_and_words_apart(folder):
    origins = {read(folder).origin, read(folder, "other").origin, read(folder, category="style").origin}
    Image.new("RGB", (60, 50), BLUE).save(folder / "0.png")
    origins.add(read(folder).origin)
    for index in range(5):
        (folder / f"{index}.txt").write_text("a zog")
    origins.add(read(folder).origin)
    assert len(origins) == 5
    assert read(folder).origin in origins


def _bomb(folder):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


def _cut(folder):
    Image.effect_noise((80, 80), 90).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:900])


TROUBLES = {
    "bomb": (_bomb, ["bomb.png", "pixels", "smaller"]),
    "large": (lambda f: Image.new("1", (12_000, 9_000)).save(f / "large.png"), ["large.png", "12000x9000"]),
    "cut": (_cut, ["cut.png", "cannot be read"]),
    "not a picture": (lambda f: (f / "fake.jpg").write_bytes(b"<html>"), ["fake.jpg", "cannot be read"]),
    "other format": (lambda f: Image.new("RGB", (40, 40)).save(f / "x.png", "GIF"), ["x.png", "cannot be read"]),
    "tiny": (lambda f: Image.new("RGB", (8, 40)).save(f / "tiny.png"), ["tiny.png", "8x40"]),
    "caption without picture": (lambda f: (f / "lost.txt").write_text("a zog"), ["lost.txt", "without a picture"]),
    "picture without caption": (lambda f: (f / "0.txt").write_text("a zog"), ["1.jpg", "without a caption", "1.txt"]),
    "empty caption": (lambda f: [(f / f"{i}.txt").write_text(" \n") for i in range(5)], ["0.png", "empty"]),
    "two of one name": (lambda f: [Image.new("RGB", (40, 40)).save(f / "0.bmp"), (f / "0.txt").write_text("a")], ["0.bmp", "0.png"]),
    "not UTF-8": (lambda f: (f / "0.txt").write_bytes(b"\xff\xfea\0"), ["0.txt", "UTF-8"]),
    "both": (lambda f: [(f / "metadata.jsonl").write_text("{}"), (f / "0.txt").write_text("a")], ["metadata.jsonl", "0.txt"]),
    "no JSON": (lambda f: (f / "metadata.jsonl").write_text("\n{"), ["metadata.jsonl, line 2", "file_name"]),
    "no text": (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png"}'), ["line 1", '"text"']),
    "row without picture": (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}'), ["'9.png'", "no such"]),
    "row missing": (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}'), ["1.jpg", "a line in"]),
    "row twice": (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' * 2), ["line 2", "already"]),
    "empty table": (lambda f: (f / "metadata.jsonl").write_text("\n"), ["metadata.jsonl", "empty"]),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_is_named_at_the_door(folder, trouble):
    spoil, words = TROUBLES[trouble]
    spoil(folder)
    with pytest.raises(Refused) as refused:
        read(folder)
    for word in words:
        assert word in str(refused.value)


def test_no_folder_no_pictures(tmp_path):
    with pytest.raises(Refused, match="there is no folder .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(Refused, match=r"no pictures in .*\.png"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="not a folder"):
        read(tmp_path / "file")


@pytest.mark.parametrize("trigger", ["", "  ", "?!", "a, b", "x" * 101, "a\x1b[2J"])
def test_a_trigger_no_prompt_could_name(trigger):
    with pytest.raises(Refused, match="trigger"):
        captions.check_trigger(trigger)


def test_plain_prompts_read_as_sentences():
    assert captions.check_trigger("  my   cat ") == "my cat"
    assert captions.plain("owl", "character") == ("an owl", "a picture of an owl")
    assert captions.plain("the tower", "place")[-1] == "a picture, the tower"
    assert captions.plain("a zog", "object")[0] == "a zog"
    assert captions.plain("inky", "style") == ("inky", "a picture, inky")
    for category in ("object", "style", "place"):
        assert all("zog" in prompt for prompt in captions.examples("zog", category))
    assert "" in captions.others()
