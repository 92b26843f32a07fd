"""KeyboardInterrupt at a chosen instruction of Medley's own code, of contextlib and of torch's stack of modes.

`places` lists the instructions that a call executes, each once; `interrupted` makes the call again and raises at one of them, and, as a
second Ctrl-C may, some instructions later again. (Python stops tracing when a trace function raises; a profile function begins it anew.)
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from torch import overrides

import composition

HOMES = (composition.__path__[0], contextlib.__file__, overrides.__file__)
NEVER = sys.maxsize


class _Trace:
    """Counts instructions; raises at the n-th, and at the `again`-th after it."""

    def __init__(self, at: int = NEVER, again: int = NEVER) -> None:
        self.at, self.again, self.count = at, again, 0
        self.last: dict[tuple[Any, int], int] = {}  # instruction to when it was last executed

    def __call__(self, frame: Any, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(HOMES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.count += 1
            if self.at == NEVER:
                self.last[frame.f_code, frame.f_lasti] = self.count
            if self.count == self.at:
                if self.again != NEVER:
                    sys.setprofile(self._rearm)
                raise KeyboardInterrupt
        return self

    def _rearm(self, frame: Any, event: str, argument: object) -> None:
        """At the first call or return after the interruption: trace again, in the frames that are there too."""
        sys.setprofile(None)
        second = _Trace(self.again)
        sys.settrace(second)
        while frame is not None:
            if frame.f_code.co_filename.startswith(HOMES):
                frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = second, True, False
            frame = frame.f_back


def places(call: Callable[[], object]) -> list[int]:
    """When each instruction of a call is last executed, counted in instructions, in that order."""
    trace = _Trace()
    _traced(trace, call)
    return sorted(trace.last.values())


def interrupted(call: Callable[[], object], at: int, again: int = NEVER) -> BaseException | None:
    """What came out of the call that was interrupted there, with all its frames; None where it caught it or ended before."""
    try:
        _traced(_Trace(at, again), call)
    except (Exception, KeyboardInterrupt) as error:  # an error of its own may follow from a second interruption
        return error
    return None


def _traced(trace: _Trace, call: Callable[[], object]) -> None:
    kept = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.setprofile(None)
        sys.settrace(kept)
