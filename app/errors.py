"""What went wrong, in one sentence for people."""

from pydantic import ValidationError

from composition import Refused
from composition.request import explain, shortened


def sentence(error: BaseException) -> str:
    """The error in the user's words: never a traceback, never a bare class name."""
    if isinstance(error, ValidationError):
        return explain(error)
    if isinstance(error, Refused):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory: use a smaller size (--size), --offload model, or --dtype float16"
    if isinstance(error, OSError) and error.strerror:
        return shortened(f"{error.filename or ''}: {error.strerror}".lstrip(": "))
    return shortened(f"unexpected {type(error).__name__}: {error} (MEDLEY_DEBUG=1 shows where)")
