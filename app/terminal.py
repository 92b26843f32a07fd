"""The one way to the terminal: text of strangers moves no cursor there, colours nothing, and hides nothing.

Everything that Medley prints goes through `out` or `err`. A reader that goes away (`| head -1`) and an encoding that lacks a letter
end no command: what they cannot take is dropped, or written as its number.
"""

import io
import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 but tab and newline, DEL and C1; zero-width letters, line and paragraph separators, and what turns the direction of writing
# (Unicode's bidi controls, with which a name reads otherwise than it is); tags, which nobody sees.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]")
_HALVES = re.compile("[\ud800-\udfff]")  # bytes of a file's name that are no text
_BREAKS = re.compile(r"[\t\n\r]+")


def printable(text: str) -> str:
    """Text of a file or a flag as one line of a terminal: breaks are spaces, what a terminal acts on or does not show is "?"."""
    return _harmless(_BREAKS.sub(" ", text))


def _harmless(text: str) -> str:
    return _HALVES.sub("?", _UNSAFE.sub("?", text))


class Terminal(Console):
    """A console on which no text is an instruction: neither control characters nor rich's own markup and emoji codes."""

    def __init__(self, **more: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **more)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(_harmless(segment.text), segment.style)

    def document(self, text: str) -> None:
        """Print JSON as it stands, for programs: what a terminal acts on, or its encoding lacks, as JSON's own escapes."""
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        text = _HALVES.sub(_escaped, _UNSAFE.sub(_escaped, text))
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = re.sub(r"[^\x00-\x7f]", _escaped, text)
        try:
            print(text, file=self.file, flush=True)
        except BrokenPipeError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Nobody reads on: the work goes on without words."""
        self.quiet = True
        closed(self.file)


def closed(stream: Any) -> None:
    """Let what is still written to a stream that nobody reads go nowhere, the flush at the interpreter's end included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


def gone(stream: Any) -> bool:
    """Whether what is written to a stream goes nowhere."""
    return os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))


def forgiving() -> None:
    """Let the standard streams write the letters that their encoding lacks as numbers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _escaped(letter: re.Match[str]) -> str:
    return json.dumps(letter[0])[1:-1] if ord(letter[0]) != 0x7F else "\\u007f"


out, err = Terminal(), Terminal(stderr=True)
