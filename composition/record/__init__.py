"""The picture's record: save(result, folder) writes it with its whole request inside, read(path) gives that back.

What belongs here: how a request is stored in and read from a picture file, ours and other tools', and what a recalled request
needs to be made again; details(path) is all that a file says. What does not: making pictures. May import what lies below the engine.
"""

from composition.record.png import MANIFEST, details, free, mend, publish, read, ready, relist, save, versions
from composition.record.recall import Record, by_name, differences, is_path, located
from composition.record.request_file import save as save_request

__all__ = ["MANIFEST", "Record", "by_name", "details", "differences", "free", "is_path", "located", "mend", "publish", "read", "ready", "relist", "save", "save_request", "versions"]
