"""The previews stage: a picture in each LoRA's header, the best of eight by the judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from composition import Engine, Lora, Request, backbones
from composition.backbones.loading import open as opening
from composition.training.previews import thumbnail
from retrieval.judge import Judge

from .loras import CARDS, judge_phrase, stem
from .testbed import alone

STEPS, GUIDANCE = 25, 4.5


def make(pipe: Any, names: Sequence[str], folder: Path, judge: Judge, *, base: str = "pocket", count: int = 8,
         report: Callable[[str], None] = print) -> None:  # fmt: skip
    """Draw each LoRA in ``folder`` by itself, and write the picture that shows its concept best into its header."""
    with Engine(backbones.of(pipe, opening.family(pipe)), base) as engine:
        for name in names:
            file = folder / f"{stem(name)}.safetensors"
            prompt = alone(name, CARDS[name])
            pictures = engine.run(Request(prompt, loras=[Lora(str(file))], steps=STEPS, guidance=GUIDANCE, count=count)).images
            scores = judge.cosine(pictures, [judge_phrase(name)])[:, 0]
            describe(file, {"preview": thumbnail(pictures[int(scores.argmax())])})
            report(f"{name}: preview of \"{prompt}\", cosine {scores.max():.3f}")


def describe(file: Path, more: Mapping[str, str]) -> None:
    """Write these words into the header of a safetensors file; its tensors stay as they are."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **more}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    part.chmod(0o644)
    part.replace(file)
