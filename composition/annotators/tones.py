"""Colours and greys of a picture with less in them: grey, blur, tile, layout, and the picture with a hole. No weights."""

import numpy as np
from PIL import Image, ImageFilter

from composition.refusal import Refused

BLUR = 1 / 50  # of the shorter side: the deviation of the Gaussian, ten pixels at 512
TILE = 8  # how many times smaller the picture becomes before it is enlarged again

FLAT, COLOURS = 1 / 12, 6  # of the shorter side: what is smaller is no region; and the most colours that a layout has
LAYOUT_SIDE = 96  # pixels of the shorter side at which regions are found


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


def layout(picture: Image.Image) -> Image.Image:
    """A few flat regions, each in the mean of its colours: small things are gone, and edges are plain."""
    scale = min(1.0, LAYOUT_SIDE / min(picture.size))
    small = picture.convert("RGB").resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BOX)
    window = 2 * max(1, round(FLAT * min(small.size) / 2)) + 1
    calm = small.filter(ImageFilter.MedianFilter(min(window, 9)))
    regions = calm.quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=COLOURS, dither=Image.Dither.NONE).filter(ImageFilter.ModeFilter(window))
    return regions.convert("RGB").resize(picture.size, Image.Resampling.NEAREST)


def hole(picture: Image.Image) -> Image.Image:
    """The picture, pure black where more than half of it is transparent. Raises Refused where nothing is, or everything."""
    if picture.mode != "RGBA":
        raise Refused("this picture has no hole: make the part that is to be drawn anew transparent (PNG or WebP), or give a mask, white there")
    seen = np.asarray(picture.getchannel("A")) >= 128
    if seen.all() or not seen.any():
        raise Refused(f"this picture is {'nowhere' if seen.all() else 'everywhere'} more than half transparent: it has no hole beside something "
                      "to keep")
    return Image.fromarray(np.asarray(picture.convert("RGB")) * seen[..., None].astype(np.uint8))
