"""Lines from a picture by OpenCV: Canny's edges and soft scribbles. White on black; no weights.

A line is drawn where any of the three colours changes. How strong a change must be follows from the picture itself: Otsu's threshold
over the square roots of its gradients, so that a dark picture gives the lines of the same picture in the light. (Condition
networks were mostly trained on the fixed thresholds 100 and 200; on a photo in good light about as many pixels are edges by either.)
"""

import numpy as np
from PIL import Image

from composition.refusal import Refused

FAINTEST = 16.0  # gradient (Sobel, 3x3) below which nothing is a line: a step of four levels of 255
WEAK = 0.4  # of the threshold: what is connected with a strong edge and over this is an edge too (Canny's own advice is 0.33 to 0.5)
FINE, BROAD = 1 / 366, 1 / 170  # of the shorter side: the blur before edges are drawn, and before scribbles


def canny(picture: Image.Image) -> Image.Image:
    """Edges one pixel wide. Raises Refused where there are none."""
    import cv2

    smooth = _smooth(np.asarray(picture.convert("RGB")), FINE)
    high = _threshold(_gradients(smooth))
    edges = cv2.Canny(smooth, WEAK * high, high, L2gradient=True)
    if not edges.any():
        raise Refused(_NOTHING.format("edges"))
    return Image.fromarray(edges).convert("RGB")


def scribble(picture: Image.Image) -> Image.Image:
    """Outlines as soft lines about a hundredth of the shorter side wide. Raises Refused where there are none."""
    gradients = _gradients(_smooth(np.asarray(picture.convert("RGB")), BROAD))
    share = np.clip(gradients / (1.5 * _threshold(gradients)), 0.0, 1.0)
    lines = np.rint(255.0 * share**2 * (3.0 - 2.0 * share)).astype(np.uint8)
    if not (lines > 127).any():
        raise Refused(_NOTHING.format("outlines"))
    return Image.fromarray(lines).convert("RGB")


_NOTHING = "there are no {} in this picture, it is nearly of one colour: take another, or another annotator"


def _smooth(colours: np.ndarray, share: float) -> np.ndarray:
    """Blurred by a Gaussian whose deviation is that share of the shorter side; a small picture stays as it is."""
    import cv2

    sigma = share * min(colours.shape[:2])
    return cv2.GaussianBlur(colours, (0, 0), sigma) if sigma >= 0.5 else np.ascontiguousarray(colours)


def _gradients(colours: np.ndarray) -> np.ndarray:
    """The length of the gradient at every pixel, of the colour that changes most there."""
    import cv2

    across, down = (cv2.Sobel(colours, cv2.CV_32F, *order, ksize=3) for order in ((1, 0), (0, 1)))
    return np.sqrt(across**2 + down**2).reshape(*colours.shape[:2], -1).max(axis=-1)


def _threshold(gradients: np.ndarray) -> float:
    """Otsu's threshold over the square roots of those gradients that are more than noise; FAINTEST where there are none."""
    import cv2

    strong = np.sqrt(gradients[gradients > FAINTEST])
    if not strong.size:
        return FAINTEST
    levels = np.rint(255.0 * strong / strong.max()).astype(np.uint8)
    level, _ = cv2.threshold(levels.reshape(1, -1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return max(FAINTEST, float((level / 255.0 * strong.max()) ** 2))
