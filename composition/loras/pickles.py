"""The one way in which a pickle is read, and only where the user says so: in a process of its own, offline, under limits, as weights alone.

What comes out is a safetensors file, which is then read with every check that any file gets.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from composition import untrusted
from composition.loras import unpickle
from composition.loras.safetensors import MAX_BYTES, load_safely
from composition.refusal import Refused

SECONDS, SECONDS_PER_GB = 60, 60
ROOM = 2 * 2**30  # bytes of memory beside COPIES of the file
COPIES = 4


def read(path: Path) -> bytes:
    """A pickle's tensors as the bytes of a safetensors file. Raises Refused for one that is no plain dictionary or list of tensors.

    torch's loader of weights alone builds tensors and plain containers; whatever else a pickle asks for ends it. Nothing of it is read in this process.
    """
    try:
        with untrusted.opened(path, MAX_BYTES) as file:
            size = os.fstat(file.fileno()).st_size
    except untrusted.Unreadable as error:
        raise Refused(f"{path.name} {error}") from None
    seconds = SECONDS + SECONDS_PER_GB * size // 10**9
    environment = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "TMPDIR", "TEMP") if name in os.environ}
    with TemporaryDirectory() as folder:
        target = Path(folder) / "tensors.safetensors"
        command = [sys.executable, "-I", str(Path(unpickle.__file__)), str(path.absolute()), str(target), str(ROOM + COPIES * size), str(seconds)]
        try:
            done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=2 * seconds, check=False, cwd=folder,
                                  env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        except subprocess.TimeoutExpired:
            raise Refused(f"{path.name} was not read as a pickle within {2 * seconds} s: it is broken, or made to take for ever") from None
        if done.returncode or not target.is_file():
            raise Refused(f"{path.name} is no pickle of tensors alone, and nothing of it was kept: {_reason(done)}")
        try:
            load_safely(target)
        except Refused as error:
            raise Refused(str(error).replace(target.name, path.name)) from None
        return target.read_bytes()


def _reason(done: "subprocess.CompletedProcess[bytes]") -> str:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines and done.returncode > 0 else "its process was ended, for the time or the memory that it took"
