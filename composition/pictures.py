"""The one entry for pictures from elsewhere: regular files only, few formats, few enough pixels, upright, plain errors.

Every picture from outside is opened here: masks, records, training pictures, pictures of conditions. Masks and pictures of conditions
come out of it as text too, small pictures as data URLs, so that a request holds them whole and needs no path.
"""

import base64
import binascii
import io
import math
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from composition import png_rows, untrusted
from composition.refusal import Refused
from composition.request import MAX_IMAGE

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # others have decoders that start programs (PostScript) or that few have read
MAX_PIXELS = 100_000_000  # of one picture; more is a mistake or an attack
MAX_BYTES = 512 * 2**20
MAX_QUOTED = 200  # letters of a path in a refusal
MASK_SIDE = 1024  # pixels of a mask's longer side: eight times the latents of most pictures
_EXIF, _COMMENT, _DESCRIPTION, _MAKE, _MODEL = 0x8769, 0x9286, 0x010E, 0x010F, 0x0110
CONDITION_SIDE = 1024  # pixels of the longer side of a condition's picture: EasyControl reads 512, SDXL's ControlNets 1024
LEAST_SIDE = 8  # pixels of its shorter side
LOSSLESS = 300_000  # bytes up to which it is kept as PNG: drawn lines and flat colours are, photos become WebP
MAX_TEXT = 6_000_000  # letters of such text that stays as it is
LIGHT = 192  # mean of what can be seen of a transparent picture, from which its ground is black
_DATA = re.compile(r"data:image/png(?:;name=[^;,]*)?;base64,")
_PICTURE = re.compile(r"data:image/(png|webp|jpeg)(?:;name=([^;,]*))?;base64,")
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


# pictures of conditions ------------------------------------------------------------------------------------------------


def condition(image: str, name: str = "") -> Image.Image:
    """The picture of the condition of this name ("": of none yet), from a path or a data URL: upright, 8 bits a channel, its longer side at most
    CONDITION_SIDE pixels, mode "RGB", or "RGBA" where some of it is transparent.

    Raises Refused for what cannot be read, is under LEAST_SIDE pixels high or wide, or is transparent altogether.
    """
    what = f"the picture of condition {name}" if name else "the picture"
    try:
        picture = _within(_in_colour(_opened(image)), CONDITION_SIDE)
    except Refused as error:
        raise Refused(f"{what} cannot be used: {error}") from None
    if min(picture.size) < LEAST_SIDE:
        raise Refused(f"{what} is too small or too narrow: made to fit into {CONDITION_SIDE} pixels it has "
                      f"{picture.width}x{picture.height}, and at least {LEAST_SIDE} are needed each way")
    if picture.mode == "RGBA" and not picture.getchannel("A").getbbox():
        raise Refused(f"{what} is transparent everywhere: there is nothing in it to follow")
    return picture


def condition_as_text(image: str, name: str) -> str:
    """The picture as a data URL with the name of its file, without folders: PNG, or WebP of quality 95 where that would be over
    LOSSLESS bytes. Text that this function made stays as it is. Raises Refused as `condition`.
    """
    picture = condition(image, name)
    if (head := _PICTURE.match(image)) and len(image) < MAX_TEXT and max(_opened(image).size) <= CONDITION_SIDE:
        return _head(head[1], origin(image)) + image[head.end():]
    return as_text(picture, origin(image))


def as_text(picture: Image.Image, file: str = "") -> str:
    """A picture from `condition` as such text. file: the name that it gets."""
    stream, kind = io.BytesIO(), "png"
    picture.save(stream, format="PNG")
    if stream.tell() > LOSSLESS:
        stream, kind = io.BytesIO(), "webp"
        picture.save(stream, format="WEBP", quality=95)
    return _head(kind, file) + base64.b64encode(stream.getvalue()).decode()


def _head(kind: str, file: str) -> str:
    named = f";name={quote(file, safe='')}" if file else ""
    return f"data:image/{kind}{named};base64,"


def origin(image: str) -> str:
    """The name of the file that a condition's picture came from, "" where its text has none."""
    if image.startswith("data:"):
        head = _PICTURE.match(image)
        image = unquote(head[2] or "") if head else ""
    return re.split(r"[\\/]", image.rstrip("\\/"))[-1]


# the picture that a request starts from ---------------------------------------------------------------------------------


def start(image: str) -> Image.Image:
    """The picture to start from, by a path or a data URL: upright, opaque, mode "RGB". Raises Refused for what cannot be read."""
    try:
        picture = opaque(_in_colour(_opened(image)))
    except Refused as error:
        raise Refused(f"the picture to start from cannot be used: {error}") from None
    if min(picture.size) < LEAST_SIDE:
        raise Refused(f"the picture to start from has {picture.width}x{picture.height} pixels; at least {LEAST_SIDE} are needed each way")
    return picture


def repainted(mask: str) -> Image.Image:
    """The mask of what is painted anew, by a path or a data URL, as mode "L"; what is transparent is black. Raises Refused for what cannot be
    read or is black everywhere."""
    try:
        picture = _grey(_opened(mask))
    except Refused as error:
        raise Refused(f"the mask cannot be used: {error}") from None
    if not picture.getextrema()[1]:
        raise Refused("the mask is black everywhere, so nothing would be painted anew: make white what is to change")
    return picture


def lossless(picture: Image.Image, file: str = "") -> str:
    """The picture as a data URL without any loss; as WebP of quality 95 where that would be too long for a request."""
    for settings in ({"lossless": True, "quality": 50}, {"quality": 95}):
        stream = io.BytesIO()
        picture.save(stream, format="WEBP", **settings)
        text = _head("webp", file) + base64.b64encode(stream.getvalue()).decode()
        if len(text) < MAX_IMAGE:
            break
    return text


def mask_text(mask: Image.Image, image: str) -> str:
    """A grey picture as a data URL, with the name of the file that it came from."""
    stream = io.BytesIO()
    mask.save(stream, format="PNG")
    return _head("png", origin(image)) + base64.b64encode(stream.getvalue()).decode()


def opaque(picture: Image.Image) -> Image.Image:
    """The picture on a ground that sets off what can be seen of it: white, or black where that is light itself. Mode "RGB"."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    seen = np.asarray(picture.getchannel("A"), np.float64)
    light = (np.asarray(picture.convert("RGB").convert("L"), np.float64) * seen).sum() / max(seen.sum(), 1.0)
    ground = Image.new("RGBA", picture.size, (0, 0, 0, 255) if light >= LIGHT else (255, 255, 255, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def covering(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture made smaller until it just covers (width, height), its shape kept; one that is smaller stays as it is."""
    scale = max(wanted / side for wanted, side in zip(size, picture.size, strict=True))
    return _within(picture, math.ceil(max(picture.size) * scale)) if scale < 1.0 else picture


def with_hole(picture: Image.Image, hole: Image.Image) -> Image.Image:
    """The picture transparent where the mask is white (stretched to it), mode "RGBA"."""
    alpha = 255 - np.asarray(hole.convert("L").resize(picture.size, Image.Resampling.BILINEAR))
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(np.minimum(alpha, np.asarray(clear.getchannel("A")))))
    return clear


def _opened(image: str) -> Image.Image:
    if not image.startswith("data:"):
        return load(Path(image).expanduser())
    head = _PICTURE.match(image)
    if not head:
        raise Refused(f"{image[:60]!r} is no data URL of a PNG, WebP or JPEG picture in base64")
    try:
        data = base64.b64decode(image[head.end():], validate=True)
    except (binascii.Error, ValueError):
        raise Refused("its text is damaged (base64)") from None
    return load(data, origin(image) or "it", formats=("PNG", "JPEG", "WEBP"))


def _in_colour(picture: Image.Image) -> Image.Image:
    """The picture as RGB, or as RGBA where some of it is transparent; 16 bits a pixel become 8."""
    if picture.mode.startswith("I"):
        return _grey(picture).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        return clear if np.asarray(clear.getchannel("A")).min() < 255 else clear.convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _within(picture: Image.Image, side: int) -> Image.Image:
    """The picture shrunk so that its longer side has at most `side` pixels; never enlarged."""
    scale = side / max(picture.size)
    if scale >= 1.0:
        return picture
    size = [max(1, round(length * scale)) for length in picture.size]
    return picture.resize(size, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.LANCZOS)
