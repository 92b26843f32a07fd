"""A weight encoder of the user's own library: what it learns from, and how well it finds what it never saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from app.cli import tables
from app.terminal import printable
from composition import Refused, atomic, lock

if TYPE_CHECKING:
    from app.lora_library import Example, Library
    from retrieval.judge import Judge
    from retrieval.linear import LinearEncoder
    from retrieval.metrics import Estimate

LEAST = 40  # LoRAs that something can be learned from
HELD_OUT = 5  # every so many-th LoRA, when it is measured what was not learned from
EXACT = 2**30  # bytes of LoRA files from which sketches are learned from in place of factors
MEMORY = 2**31  # bytes of the sketches of all LoRAs in double precision
SIDES = (32, 16, 8)


@dataclass(frozen=True)
class RetrieverConfig:
    """What the user asked for."""

    model: str
    folders: tuple[Path, ...]
    judge: str
    check: bool = True


def learn(config: RetrieverConfig, out: Console) -> None:
    """Fit, measure and keep the encoder, and put its vectors into the index.

    Raises Refused for a library that nothing can be learned from, and when held-out LoRAs are found no better than by chance.
    """
    from app.lora_library import Library

    library = Library(config.model, config.folders, judge=config.judge)
    if not library.base.components:
        raise Refused(f"the layers of {config.model} are not known without its weights, so its LoRAs' weights cannot be read: --behaviour of "
                      "`medley index` works with every model")  # fmt: skip
    library.refresh()
    examples = _usable(library, config, out)
    library.place.mkdir(parents=True, exist_ok=True)
    with lock.alone(library.place / ".retriever.lock", f"another training of an encoder is at work in {library.place}"):
        atomic.sweep(library.trained)
        if config.check:
            _measure(_fit([example for number, example in enumerate(examples) if number % HELD_OUT], library), examples, library.judge, out)
        _fit(examples, library).save(library.trained)
    indexed = Library(config.model, config.folders, judge=config.judge).write()
    out.print(Text(printable(f"{library.trained}\n{indexed.with_weights:,} of {indexed.fitting:,} LoRAs for {config.model} are found by their weights from now on")))


def _usable(library: "Library", config: RetrieverConfig, out: Console) -> "list[Example]":
    """Those of the library that say anything, in the order of their hashes."""
    side = next((side for side in SIDES if library.index.count() * library.base.layers * 8 * side**2 <= MEMORY), SIDES[-1])
    examples = [example for example in library.examples(None if library.size <= EXACT else side) if example.texts or example.direction is not None]
    worded, measured = sum(bool(example.texts) for example in examples), sum(example.direction is not None for example in examples)
    out.print(Text(f"{len(examples):,} LoRAs for {config.model}: {worded:,} with words, {measured:,} with a behaviour"))
    if len(examples) < LEAST:
        raise Refused(f"{len(examples)} LoRAs for {config.model} have words or a behaviour; an encoder needs {LEAST} at least, and some hundreds to "
                      "be of use: until then `medley index --behaviour` finds LoRAs without words")  # fmt: skip
    return examples


def _fit(examples: "Sequence[Example]", library: "Library") -> "LinearEncoder":
    from retrieval import null, ridge, written
    from retrieval.linear import LinearEncoder, LinearSettings
    from retrieval.sketch import Sketch

    judge, loras = library.judge, [example.lora for example in examples]
    centre = judge.read(null.phrases(list(judge.thresholds))).mean(0)
    known = dict(sorted(ridge.shapes(*loras).items()))
    directions = None
    if any(example.direction is not None for example in examples):
        directions = np.stack([np.zeros(len(centre), np.float32) if example.direction is None else example.direction for example in examples])
    lessons = written.lessons([example.texts for example in examples], lambda texts: judge.read(list(texts)).numpy(), directions)
    fit = ridge.fit(loras, lessons, list(known), centre)
    first = loras[0]
    reads = {"reads": "sketches", "side": first.side} if isinstance(first, Sketch) else {}
    return LinearEncoder.of(fit, LinearSettings(known, library.base.name, library.base.family, judge.name, len(examples), **reads), centre)


def _measure(encoder: "LinearEncoder", examples: "Sequence[Example]", judge: "Judge", out: Console) -> None:
    """Print how often a held-out LoRA's own words find it among all LoRAs. Raises Refused when that is no more than chance."""
    from retrieval import metrics

    pairs = [(number, text) for number, example in enumerate(examples) if number % HELD_OUT == 0 for text in example.texts]
    if not pairs:
        out.print("no held-out LoRA has words, so nothing was measured")
        return
    usable = [number for number, example in enumerate(examples) if encoder.knows(example.lora)]
    owners = np.array([number for number, _ in pairs])
    right = owners[:, None] == np.array(usable)[None, :]
    there = right.any(1)
    scores = (encoder.read(judge.read([text for _, text in pairs])) @ encoder.encode([examples[number].lora for number in usable]).T).numpy()
    chance = metrics.chance(len(pairs), len(usable))
    by_weights, by_chance = (metrics.evaluate(values[there], right[there], owners[there]) for values in (scores, chance))
    rows = tables.table(f"{len(set(owners.tolist()))} held-out LoRAs among {len(usable):,}", "first", "among five", right=("first", "among five"))
    for name, table in (("weights", by_weights), ("chance", by_chance)):
        rows.add_row(name, *(_percent(table[measure]) for measure in ("R@1", "R@5")))
    out.print(rows)
    if by_weights["R@5"].low <= 5 / len(usable):
        raise Refused("held-out LoRAs are not found more often than by chance, so no encoder was kept: more LoRAs, better words or `medley index "
                      "--behaviour` would help; --no-check keeps it all the same")  # fmt: skip


def _percent(value: "Estimate") -> str:
    return f"{100 * value.mean:.0f} % ({100 * value.low:.0f} to {100 * value.high:.0f})"
