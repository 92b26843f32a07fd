"""The one entry for pictures from elsewhere: regular files only, few formats, few enough pixels, upright, plain errors.

Every picture from outside is opened here: masks, records, training pictures. A mask comes out of it as text too, a small grey
PNG as a data URL, so that a request holds it whole and needs no path.
"""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from composition import png_rows, untrusted
from composition.refusal import Refused

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # others have decoders that start programs (PostScript) or that few have read
MAX_PIXELS = 100_000_000  # of one picture; more is a mistake or an attack
MAX_BYTES = 512 * 2**20
MAX_QUOTED = 200  # letters of a path in a refusal
MASK_SIDE = 1024  # pixels of a mask's longer side: eight times the latents of most pictures
_EXIF, _COMMENT, _DESCRIPTION, _MAKE, _MODEL = 0x8769, 0x9286, 0x010E, 0x010F, 0x0110
_DATA = re.compile(r"data:image/png(?:;name=[^;,]*)?;base64,")
_BOX = ("give a box [left, top, right, bottom] in fractions of the picture, as [0, 0, 0.5, 1] for its left half, or the path of a "
        "black and white image")


def load(source: Path | bytes, name: str = "", most: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The picture in this file, or in these bytes, decoded and upright.

    name: what a refusal calls it (default: the path). most: pixels. Raises Refused for what is none or is too large.
    """
    return _decoded(source, name or str(source)[:MAX_QUOTED], most, formats)[0]


def load_with_texts(path: Path) -> tuple[Image.Image, Mapping[str, str]]:
    """The picture and the texts in its file: a PNG's by their keywords; a JPEG's or WebP's EXIF comment as "parameters", the
    keyword under which the same tools put it into a PNG. Raises Refused as `load`."""
    return _decoded(path, str(path)[:MAX_QUOTED])


def _decoded(
    source: Path | bytes, name: str, most: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS,
) -> tuple[Image.Image, dict[str, str]]:
    with _stream(source, name) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too many pixels, for which our own limit is lower, and of what is odd in a file
        try:
            with Image.open(stream, formats=formats) as opened:
                if opened.width * opened.height > most:
                    raise Refused(f"{name} has {opened.width}x{opened.height} pixels, over {most:,}: make it smaller")
                if opened.format == "PNG":  # before it is decoded: a hundred bytes may claim a hundred million pixels
                    place = stream.tell()
                    if not png_rows.complete(stream):
                        raise Refused(f"{name} cannot be read as a picture: it is cut short, and what is missing would be black; save it anew, or take another")
                    stream.seek(place)
                opened.load()
                return ImageOps.exif_transpose(opened), _texts(opened)
        except Refused:
            raise
        except Image.DecompressionBombError:
            raise Refused(f"{name} has far more than {most:,} pixels: make it smaller") from None
        except UnidentifiedImageError:
            raise Refused(f"{name} cannot be read as a picture: it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
        except Exception as error:  # what decoders raise on damaged files is an open list: struct.error, IndexError, KeyError, ...
            raise Refused(f"{name} cannot be read as a picture ({type(error).__name__}): save it anew, or take another") from None


def _stream(source: Path | bytes, name: str) -> io.BytesIO | io.FileIO:
    """The bytes of a regular file. Raises Refused for a pipe or a device, which would never end, and for what is not there."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return untrusted.opened(source, MAX_BYTES)
    except untrusted.Unreadable as error:
        raise Refused(f"{name} {error}") from None


def _texts(opened: Image.Image) -> dict[str, str]:
    if isinstance(opened, PngImagePlugin.PngImageFile):
        texts = {key: str(value) for key, value in opened.text.items()}
        if texts:
            return texts
    exif = opened.getexif()
    for tag in (_MAKE, _MODEL):  # where ComfyUI has them
        key, colon, text = _plain_text(exif.get(tag)).partition(":")
        if colon and key in ("workflow", "prompt"):
            return {key: text}
    comment = exif.get_ifd(_EXIF).get(_COMMENT, b"")
    candidates = [_user_comment(comment), _plain_text(exif.get(_DESCRIPTION)), _plain_text(opened.info.get("comment"))]
    settings = [text for text in candidates if "Steps:" in text] or [text for text in candidates if text]
    return {"parameters": settings[0]} if settings else {}


def _user_comment(comment: object) -> str:
    """EXIF's UserComment: eight bytes that name its encoding, then the text. UNICODE is UTF-16, in whichever order of bytes."""
    if not isinstance(comment, bytes):
        return _plain_text(comment)
    code, data = comment[:8], comment[8:]
    if code.startswith(b"UNICODE"):
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return data.decode("utf-16", "replace").strip("\0 ")
        high = data[0::2].count(0) >= data[1::2].count(0)  # Latin letters have a zero byte: before them when the high byte is first
        return data.decode("utf-16-be" if high else "utf-16-le", "replace").strip("\0 ")
    known = code in (b"ASCII\0\0\0", b"\0" * 8)
    return _plain_text(data if known else comment)


def _plain_text(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""
    return text.strip("\0 ")


# masks -----------------------------------------------------------------------------------------------------------------


def mask(region: str, name: str) -> Image.Image:
    """The mask image of the LoRA of this name, from a path or a data URL, as mode "L" (white is the LoRA's place).

    What is transparent counts as black. Raises Refused for what cannot be read.
    """
    if region.startswith("data:"):
        return _mask_in(region, name)
    try:
        return _grey(load(Path(region)))
    except Refused as error:
        raise Refused(f"the region of LoRA {name} is no picture that can be read: {error}; {_BOX}") from None


def mask_as_text(region: str, name: str) -> str:
    """The mask as a data URL: a grey PNG, its longer side at most MASK_SIDE pixels, with the path that it came from as its name.

    A mask that is such text already stays as it is.
    """
    picture = mask(region, name)
    if region.startswith("data:") and max(picture.size) <= MASK_SIDE:
        return region
    if max(picture.size) > MASK_SIDE:
        scale = MASK_SIDE / max(picture.size)
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    origin = "" if region.startswith("data:") else f";name={quote(region, safe='/')}"
    return f"data:image/png{origin};base64,{base64.b64encode(stream.getvalue()).decode()}"


def without_name(region: str) -> str:
    """The same mask without the path that it came from."""
    return re.sub(r"^data:image/png;name=[^;,]*;", "data:image/png;", region)


@lru_cache(maxsize=16)  # read at every step of a picture
def _mask_in(text: str, name: str) -> Image.Image:
    head = _DATA.match(text)
    if not head:
        raise Refused(f"the region of LoRA {name} is {text[:60]!r}, no picture that can be read: {_BOX}")
    try:
        data = base64.b64decode(text[head.end():], validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"the region of LoRA {name} is a mask whose text is damaged (base64): {_BOX}") from None
    return _grey(_decoded(data, f"the mask of LoRA {name}")[0])


def _grey(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(picture, np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
    return picture.convert("L")
