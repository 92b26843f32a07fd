"""Run by `pickles` as a process of its own: python -I unpickle.py PICKLE OUT BYTES SECONDS.

Reads one pickle with torch's loader of weights alone, under limits of memory and processor time, and writes its tensors as safetensors. What
a picture of weights never needs (the network, other programs, files to write to) ends it. Imports nothing of Medley: the folder it lies in is not looked at.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

LISTED = ("up", "down")  # in the order in which first-generation files list them
_BARRED = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod",
           "shutil.", "ctypes.dlopen", "webbrowser.", "urllib.", "ftplib.", "smtplib.")  # fmt: skip


def main(source: str, target: str, most_bytes: int, most_seconds: int) -> None:
    import torch
    from safetensors.torch import save

    _limited(most_bytes, most_seconds)
    sys.addaudithook(_barred)
    document = torch.load(source, map_location="cpu", weights_only=True)
    tensors = dict(named(document))
    if not tensors:
        raise ValueError("it holds no tensors by name")
    data = save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, {"format": "pt"})
    with open(target, "wb") as file:
        file.write(data)


def named(document: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of a dictionary by its name, also one level down (state_dict and the like); a list of factors as first-generation files number them."""
    import torch

    if isinstance(document, list | tuple):
        if len(document) % 2 or not all(isinstance(each, torch.Tensor) for each in document):
            raise ValueError("it is a list, and not one of pairs of factors")
        yield from ((f"unet:{index // 2}:{LISTED[index % 2]}", each) for index, each in enumerate(document))
        return
    if not isinstance(document, dict):
        raise ValueError(f"it is a {type(document).__name__}, not a dictionary of tensors")
    for name, value in document.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif isinstance(value, dict):
            yield from ((str(inner), tensor) for inner, tensor in value.items() if isinstance(tensor, torch.Tensor))


def reason(error: Exception) -> str:
    """Why it was not read, as the end of a sentence. torch's own words advise to read it without any guard: they are not repeated."""
    text = " ".join(str(error).split())
    if "weights_only" in text.lower() or "weights only" in text.lower():
        wanted = re.search(r"GLOBAL ([\w.]{1,100})", text)
        return f"it asks for {wanted[1] if wanted else 'something'}, which is no tensor and could run code"
    return f"{type(error).__name__}: {text}"[:300]


def _limited(most_bytes: int, most_seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's clock alone
        return
    in_use = 0
    try:
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        in_use = 8 * 2**30  # what torch maps, and more
    for kind, most in ((resource.RLIMIT_AS, in_use + most_bytes), (resource.RLIMIT_CPU, most_seconds)):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # a system that lacks this limit
            continue


def _barred(event: str, arguments: Any) -> None:
    if event.startswith(_BARRED):
        raise PermissionError(f"it asked for {event}")


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    except Exception as error:
        sys.exit(reason(error))  # to standard error, with status 1
