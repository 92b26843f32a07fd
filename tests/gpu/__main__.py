"""What only a GPU can show, by one command: a table, and JSON after each part.

    python -m tests.gpu [--parts a,b,c,d,e,f] [--out FOLDER] [--seconds TOTAL] [--seconds-a N ...] [--steps 10] [--device cuda] [--tiny]

Parts, in order of importance (a, c and d together take at most four minutes on one large GPU with 16 cores):
  a  every method on Pocket and Pocket-FLUX against the processor's float32, and every way of offloading with two LoRAs
  b  true sizes with random weights: stock PEFT, live, one-hot rows and folded over the bare base; compiled; memory
  c  Composite, CMLoRA and CLoRA fast over Merge, step by step
  d  the trainer's steps a second for 1, 4 and 16 adapters
  e  int8, fp8 and nf4 with two LoRAs
  f  FLUX's width with one and two conditions: masked, cached as published, and from banks, over the plain evaluation

FOLDER (else $OUT, else out/gpu) gets gpu.json and gpu.txt. Each chapter of a part is a process of its own with a limit of its own: what
fails there, or takes the device with it, is told in the table, and the rest goes on. --tiny is the same in small, for a processor.
The exit code is 1 when anything failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.gpu import table
from tests.gpu.plan import PARTS, limits
from tests.gpu.report import read

GRACE = 10.0  # seconds beyond its limit in which a chapter may end what it has begun


def run(command: Sequence[str], file: Path, seconds: float, save: Any = lambda content: None) -> tuple[dict[str, Any], str]:
    """Run a chapter's command; what it has written, and how it ended ("" as it should). At its limit it and all its children are ended.

    save: handed what the chapter has written by now, every second or so.
    """
    process = subprocess.Popen([*command], process_group=0)
    ended = time.monotonic() + seconds
    try:
        while True:
            try:
                code = process.wait(min(1.0, max(ended - time.monotonic(), 0.0)))
                break
            except subprocess.TimeoutExpired:
                save(read(file))
            if time.monotonic() >= ended:
                return read(file), f"stopped at its limit of {seconds:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, whatever became of it
        except ProcessLookupError:
            pass
        process.wait()
    if code < 0:
        return read(file), f"ended by {signal.Signals(-code).name}"
    return read(file), "failed" if code else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in the order they are run in")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu"))
    parser.add_argument("--seconds", type=float, help="for all parts together, shared by weight")
    for part, entry in PARTS.items():
        parser.add_argument(f"--seconds-{part}", type=float, help=f"for part {part} ({entry.seconds:.0f})")
    parser.add_argument("--steps", type=int, help="of a picture (10; tiny 2)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda, and with --tiny cpu")
    parser.add_argument("--tiny", action="store_true", help="in small, to see that the command works")
    asked = parser.parse_args()
    parts = [part for part in asked.parts.split(",") if part]
    if strange := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {strange[0]!r}: parts are {', '.join(PARTS)}")
    device = asked.device or ("cpu" if asked.tiny else "cuda")
    if device == "cpu" and not asked.tiny:
        parser.error("on a processor the whole would take days: add --tiny")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a chapter in progress is ended too
    own = {part: seconds for part in PARTS if (seconds := getattr(asked, f"seconds_{part}")) is not None}
    asked.out.mkdir(parents=True, exist_ok=True)

    results: dict[str, Any] = {"command": sys.argv[1:], "machine": {}, "parts": {}}
    lines: list[str] = []
    wrong = False
    with TemporaryDirectory() as folder:
        for part, seconds in limits(parts, asked.seconds, own).items():
            entry, begun = PARTS[part], time.time()
            results["parts"][part] = chapters = {}
            text = [f"({part}) {entry.title}"]
            shares = sum(share for _, share in entry.chapters.values())
            for name, (module, share) in entry.chapters.items():
                file = Path(folder) / f"{part}-{name}.json"
                room = max(seconds - (time.time() - begun), 0.0) * share / shares  # what an earlier chapter left is shared on
                shares -= share
                command = [sys.executable, "-m", "tests.gpu.chapter", module, "--file", str(file), "--until", str(time.time() + room),
                           "--device", device, "--steps", str(asked.steps or (2 if asked.tiny else 10)), *(["--tiny"] if asked.tiny else [])]

                def save(content: dict[str, Any], chapters: dict[str, Any] = chapters, name: str = name) -> None:
                    chapters[name] = content
                    results["machine"] = results["machine"] or content.get("machine", {})
                    write(asked.out / "gpu.json", json.dumps(results, indent=1))

                content, end = run(command, file, room + GRACE, save)
                save(content | {"end": end})
                wrong = wrong or bool(end)
                text += table.chapter(name, content, end)
            if not lines:
                lines.append(table.machine(results["machine"]))
                print(lines[0])
            lines += ["", *text]
            print("\n".join(["", *text]), flush=True)
            write(asked.out / "gpu.txt", "\n".join(lines) + "\n")
    return int(wrong)


def write(file: Path, text: str) -> None:
    """Whole or not at all: the command may be ended at any time."""
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


if __name__ == "__main__":
    sys.exit(main())
