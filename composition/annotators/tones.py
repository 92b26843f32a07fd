"""Colours and greys of a picture with less in them: grey, blur, tile, and the picture with a hole. By OpenCV; no weights."""

import numpy as np
from PIL import Image

from composition.refusal import Refused

BLUR = 1 / 50  # of the shorter side: the deviation of the Gaussian, ten pixels at 512
TILE = 8  # how many times smaller the picture becomes before it is enlarged again


def grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def blur(picture: Image.Image) -> Image.Image:
    import cv2

    return Image.fromarray(cv2.GaussianBlur(np.asarray(picture.convert("RGB")), (0, 0), BLUR * min(picture.size)))


def tile(picture: Image.Image) -> Image.Image:
    import cv2

    small = [max(1, round(side / TILE)) for side in picture.size]
    shrunk = cv2.resize(np.asarray(picture.convert("RGB")), small, interpolation=cv2.INTER_AREA)
    return Image.fromarray(cv2.resize(shrunk, picture.size, interpolation=cv2.INTER_CUBIC))


def hole(picture: Image.Image) -> Image.Image:
    """The picture, pure black where more than half of it is transparent. Raises Refused where nothing is, or everything."""
    if picture.mode != "RGBA":
        raise Refused("this picture has no hole: make the part that is to be drawn anew transparent (PNG or WebP), or give a mask, white there")
    seen = np.asarray(picture.getchannel("A")) >= 128
    if seen.all() or not seen.any():
        raise Refused(f"this picture is {'nowhere' if seen.all() else 'everywhere'} more than half transparent: it has no hole beside something "
                      "to keep")
    return Image.fromarray(np.asarray(picture.convert("RGB")) * seen[..., None].astype(np.uint8))
