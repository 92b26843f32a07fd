"""Whether a PNG holds all the rows that it claims: decoders leave those that are missing black and say nothing."""

import struct
import zlib
from io import BytesIO, FileIO

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the format's number of a kind of colour
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, steps: of Adam7
_PART = 2**20  # bytes


def complete(stream: BytesIO | FileIO) -> bool:
    """True when the picture's data is as long as its size says, or longer. The stream is read anew from its beginning.

    Raises struct.error, zlib.error or KeyError for a file that no decoder reads either. Takes little memory, whatever the picture.
    """
    stream.seek(8)
    missing, inflater = 0, zlib.decompressobj()
    while head := stream.read(8):
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IHDR":
            missing = _size(*struct.unpack(">IIBB2xB", stream.read(13)))
            length -= 13
        elif kind == b"IDAT":
            while length > 0 and missing > 0 and (data := stream.read(min(length, _PART))):
                length -= len(data)
                while data and missing > 0:
                    missing -= len(inflater.decompress(data, _PART))
                    data = inflater.unconsumed_tail
        if kind == b"IEND" or missing <= 0:
            break
        stream.seek(length + 4, 1)  # what was not read of it, and its sum
    return missing <= 0


def _size(width: int, height: int, bits: int, colour: int, interlaced: int) -> int:
    """Bytes of the rows before they are compressed, each with a byte for its filter."""
    bits *= _CHANNELS[colour]
    parts = [(-(-max(0, width - x) // across), -(-max(0, height - y) // down)) for x, y, across, down in _PASSES] if interlaced else [(width, height)]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in parts if columns)
