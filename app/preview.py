"""Previews of a picture while it is made, as often as a quarter of the running time allows."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from composition import Event

GAP = 0.25  # seconds between two previews at least
REST = 3.0  # times what a preview took are spent on the picture itself before the next one
SIDE = 512  # pixels of a preview's longer side at most


class Preview:
    """Decodes the latents of a step when a preview is due.

    decode: latents (B, *S) to B pictures. clock: seconds. What the last decode took is remembered from one picture to
    the next, so only the very first one is made without knowing its price.
    """

    def __init__(self, decode: Callable[[Any], list[Image.Image]], clock: Callable[[], float] = time.perf_counter) -> None:
        self._decode, self._clock = decode, clock
        self._cost = 0.0
        self.begin()

    def begin(self) -> None:
        """A new picture begins now."""
        self._rest(self._clock())

    def of(self, event: "Event") -> Image.Image | None:
        """The small picture of this step, None when none is due. The last step has none: the picture itself follows."""
        begun = self._clock()
        if event.index >= event.count or begun < self._due:
            return None
        image = self._decode(event.latents[:1])[0]
        image.thumbnail((SIDE, SIDE))
        ended = self._clock()
        self._cost = ended - begun
        self._rest(ended)
        return image

    def _rest(self, now: float) -> None:
        self._due = now + max(GAP, REST * self._cost)
