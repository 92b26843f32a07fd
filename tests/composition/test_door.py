"""The one door for pictures of others: what is no picture, or too large, or endless, is refused in plain words; masks as text."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from composition import Refused, pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(b"".join(b"\0" + bytes(width) for _ in range(min(height, 64))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BROKEN = {
    "bomb": png(60_000, 60_000), "large": png(12_000, 9_000), "empty": b"", "text": b"hello",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "svg": b"<svg/>", "header only": png(8, 8)[:33],
    "cut": png(8, 8)[:44], "gAMA": png(8, 8, chunk(b"gAMA", b"\1")), "tRNS": png(8, 8, chunk(b"tRNS", b"\1\2\3\4\5")),
    "iCCP": png(8, 8, chunk(b"iCCP", b"x")), "pHYs": png(8, 8, chunk(b"pHYs", b"\1")), "iTXt bomb": png(
        8, 8, chunk(b"iTXt", b"medley\0\1\0\0\0" + zlib.compress(bytes(80_000_000)))),
    "zero wide": png(0, 8), "jpeg": b"\xff\xd8\xff\xe1\x00\x08Exif\0\0", "webp": b"RIFF\x10\0\0\0WEBPVP8 ", "bmp": b"BM" + bytes(20),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_refused_or_harmless(name, tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(BROKEN[name])
    try:
        picture = pictures.load(file)
    except Refused as error:
        assert "x.png" in str(error)
    else:
        assert name in ("gAMA", "tRNS", "iCCP", "pHYs") and picture.size == (8, 8)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, said in ((tmp_path / "pipe.png", "pipe"), (tmp_path, "folder"), (tmp_path / "none.png", "not there"), (tmp_path / "a\0b", "opened"),
                       (tmp_path / ("x" * 5000), "opened"), (tmp_path / "pipe.png" / "x", "opened")):
        with pytest.raises(Refused, match=said):
            pictures.load(path)


def test_pictures_come_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg", exif=exif)
    assert pictures.load(tmp_path / "x.jpg").size == (10, 20)


def comment(text: str, kind: str) -> bytes:
    return {"be": b"UNICODE\0" + text.encode("utf-16-be"), "le": b"UNICODE\0" + text.encode("utf-16-le"),
            "bom": b"UNICODE\0" + text.encode("utf-16"), "ascii": b"ASCII\0\0\0" + text.encode("ascii", "replace"),
            "none": bytes(8) + text.encode(), "bare": text.encode()}[kind]


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
@pytest.mark.parametrize("kind", ["be", "le", "bom", "ascii", "none", "bare"])
def test_the_comment_of_exif_is_read(tmp_path, ending, kind):
    text = "a raccoon in the snow, caf\u00e9\nSteps: 5, Seed: 1, CFG scale: 2" if kind != "ascii" else "a fox\nSteps: 5, Seed: 1, CFG scale: 2"
    exif = Image.Exif()
    exif[0x0131] = "a program"  # Pillow leaves out what has nothing outermost
    exif.get_ifd(0x8769)[0x9286] = comment(text, kind)
    Image.new("RGB", (8, 8)).save(tmp_path / f"x.{ending}", exif=exif)
    assert pictures.load_with_texts(tmp_path / f"x.{ending}")[1] == {"parameters": text}


# masks


def test_a_mask_as_text_is_the_same_mask(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (30, 50), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a mask;1,2.png")
    text = pictures.mask_as_text(str(tmp_path / "a mask;1,2.png"), "owl")
    assert text.startswith("data:image/png;name=/") and "a%20mask%3B1%2C2.png;base64," in text
    bare = pictures.without_name(text)
    assert str(tmp_path) not in bare and bare.startswith("data:image/png;base64,")
    for same in (text, bare):
        assert (np.asarray(pictures.mask(same, "owl")) == grey).all()
        assert pictures.mask_as_text(same, "owl") == same


def test_a_large_mask_is_made_smaller_once(tmp_path):
    Image.new("L", (3000, 1500), 200).save(tmp_path / "mask.png")
    text = pictures.mask_as_text(str(tmp_path / "mask.png"), "owl")
    assert pictures.mask(text, "owl").size == (1024, 512) and pictures.mask_as_text(text, "owl") == text


@pytest.mark.parametrize(("picture", "white"), [
    (Image.new("RGBA", (4, 4), (255, 255, 255, 0)), 0), (Image.new("LA", (4, 4), (255, 255)), 255), (Image.new("1", (4, 4), 1), 255),
    (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), 100), (Image.new("P", (4, 4), 0), 0)])
def test_every_kind_of_mask(tmp_path, picture, white):
    picture.save(tmp_path / "mask.png")
    assert (np.asarray(pictures.mask(str(tmp_path / "mask.png"), "owl")) == white).all()


@pytest.mark.parametrize("region", ["data:image/png;base64,%%%", "data:image/png;base64,aGVsbG8=", "data:text/html,x", "data:image/png;base64,", "no"])
def test_a_mask_that_is_none_is_refused(region):
    with pytest.raises(Refused, match="LoRA owl"):
        pictures.mask(region, "owl")


def interlaced(width: int, height: int, left_out: int = 0) -> bytes:
    """A grey PNG in the order of Adam7, from the format's own text, without the last bytes of its rows."""
    order = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b""
    for x, y, across, down in order:
        if columns := len(range(x, width, across)):
            rows += (b"\0" + bytes(columns)) * len(range(y, height, down))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows[: len(rows) - left_out])) + chunk(b"IEND", b"")


def test_a_picture_without_its_last_rows_is_refused_and_not_black():
    """Decoders leave missing rows black and say nothing: half a mask would be a wrong picture."""
    for width, height in ((1, 1), (3, 17), (16, 8), (9, 30)):
        assert pictures.load(interlaced(width, height), "x").size == (width, height)
        with pytest.raises(Refused, match="x cannot be read"):
            pictures.load(interlaced(width, height, 1), "x")
    rows = zlib.compress((b"\0" + b"\xff" * 64) * 10)
    for height in (10, 11, 64):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, height, 8, 0, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows[:9]) + chunk(b"IDAT", rows[9:]) + chunk(b"IEND", b"")
        if height == 10:
            assert np.asarray(pictures.load(data, "x")).min() == 255
        else:
            with pytest.raises(Refused, match="x cannot be read .*it is cut short"):
                pictures.load(data, "x")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_whole_pictures_of_every_kind_pass(mode):
    for size in ((1, 1), (7, 3), (8, 8), (100, 33)):
        stream = io.BytesIO()
        Image.new(mode, size).save(stream, "PNG")
        assert pictures.load(stream.getvalue(), "x").size == size
