"""The picture's record: save(result, folder) writes it with its whole request inside, read(path) gives that back.

What belongs here: how a request is stored in and read from a picture file, ours and other tools'. What does not: making pictures,
words for people. May import what lies below the engine.
"""

from composition.record.png import MANIFEST, Record, free, publish, read, ready, relist, save, versions

__all__ = ["MANIFEST", "Record", "free", "publish", "read", "ready", "relist", "save", "versions"]
