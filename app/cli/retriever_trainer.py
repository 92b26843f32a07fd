"""The training of a weight encoder on the user's own library: what it learns from, how well it finds what it never saw, a stop that can be resumed."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from app import workbench
from app.cli import tables
from app.cli.progress import Bar
from app.terminal import printable
from composition import Refused, atomic, lock

if TYPE_CHECKING:
    from app.lora_library import Example, Library
    from retrieval.encode import Encoder
    from retrieval.judge import Judge
    from retrieval.metrics import Estimate

LEAST = 40  # LoRAs that something can be learned from
HELD_OUT = 10  # every so many-th LoRA, when it is measured what training did not see
MEMORY = 2**32  # bytes of the sketches of all LoRAs
SIDES = (32, 16, 8)


@dataclass(frozen=True)
class RetrieverConfig:
    """What the user asked for."""

    model: str
    folders: tuple[Path, ...]
    judge: str
    steps: int
    check: bool = True
    seed: int = 0


def learn(config: RetrieverConfig, out: Console, err: Console) -> bool:
    """Train, measure and keep the encoder, and put its vectors into the index; False when Ctrl-C stopped it.

    Raises Refused for a library that nothing can be learned from, and when held-out LoRAs are found no better than by chance.
    """
    from app.lora_library import Library

    library = Library(config.model, config.folders, judge=config.judge)
    if not library.base.components:
        raise Refused(f"the layers of {config.model} are not known without its weights, so its LoRAs' weights cannot be read: --behaviour of "
                      "`medley index` works with every model")  # fmt: skip
    library.refresh()
    examples = _usable(library, config, out)
    place = library.place
    place.mkdir(parents=True, exist_ok=True)
    with lock.alone(place / ".retriever.lock", f"another training of an encoder is at work in {place}"), workbench.stoppable() as stop:
        atomic.sweep(place, shared=True)
        checkpoints = [place / f"retriever-{name}.training" for name in ("check", "all")]
        if config.check:
            own = [number for number in range(len(examples)) if number % HELD_OUT]
            encoder = _train([examples[number] for number in own], library, config, checkpoints[0], stop, "held-out check", err)
            if encoder is None:
                return False
            _measure(encoder, examples, library.judge, out)
        encoder = _train(examples, library, config, checkpoints[1], stop, "all LoRAs", err)
        if encoder is None:
            return False
        encoder.save(library.trained)
        for file in checkpoints:
            file.unlink(missing_ok=True)
    indexed = Library(config.model, config.folders, judge=config.judge).write()
    out.print(Text(printable(f"{library.trained}\n{indexed.with_weights:,} of {indexed.fitting:,} LoRAs for {config.model} are found by their weights from now on")))
    return True


def _usable(library: "Library", config: RetrieverConfig, out: Console) -> "list[Example]":
    """Those of the library that say anything, in the order of their hashes."""
    side = next((side for side in SIDES if library.index.count() * library.base.layers * 4 * side**2 <= MEMORY), SIDES[-1])
    examples = [example for example in library.examples(side) if example.texts or example.direction is not None]
    worded, measured = sum(bool(example.texts) for example in examples), sum(example.direction is not None for example in examples)
    out.print(Text(f"{len(examples):,} LoRAs for {config.model}: {worded:,} with words, {measured:,} with a behaviour"))
    if len(examples) < LEAST:
        raise Refused(f"{len(examples)} LoRAs for {config.model} have words or a behaviour; an encoder needs {LEAST} at least, and some hundreds to "
                      "be of use: until then `medley index --behaviour` finds LoRAs without words")  # fmt: skip
    return examples


def _train(examples: "Sequence[Example]", library: "Library", config: RetrieverConfig, checkpoint: Path, stop: threading.Event, title: str,
           err: Console) -> "Encoder | None":  # fmt: skip
    """None when it was stopped; what was learned is in the checkpoint then."""
    from retrieval import training, written
    from retrieval.encode import Settings
    from retrieval.tokens import layers, tokens

    judge, sketches = library.judge, [example.sketch for example in examples]
    width = judge.read(["a picture"]).shape[1]
    known = layers(sketches)
    directions = None
    if any(example.direction is not None for example in examples):
        directions = np.stack([np.zeros(width, np.float32) if example.direction is None else example.direction for example in examples])
    lessons = written.lessons([example.texts for example in examples], lambda texts: judge.read(list(texts)).numpy(), directions)
    settings = Settings(layers=known, base=library.base.name, family=library.base.family, judge=judge.name, text=width, dimension=width,
                        side=sketches[0].side)  # fmt: skip
    plan = training.Plan(seed=config.seed, steps=config.steps, batch=min(training.Plan.batch, len(examples)), warm=min(training.Plan.warm, config.steps))
    with Bar(config.steps, 0, err) as bar:
        if not err.is_terminal:
            err.print(Text(title))
        encoder = training.train(tokens(sketches, known, settings.side), lessons, settings, plan, checkpoint=checkpoint, on_step=bar.show,
                                 stop=stop.is_set)  # fmt: skip
    if stop.is_set():
        err.print(Text(printable(f"medley: stopped at step {bar.step} of {config.steps} ({title}); the same command goes on from there "
                                 f"(to begin again, delete {checkpoint})")))  # fmt: skip
        return None
    return encoder


def _measure(encoder: "Encoder", examples: "Sequence[Example]", judge: "Judge", out: Console) -> None:
    """Print how often a held-out LoRA's own words find it among all LoRAs. Raises Refused when that is no more than chance."""
    from retrieval import metrics

    pairs = [(number, text) for number, example in enumerate(examples) if number % HELD_OUT == 0 for text in example.texts]
    if not pairs:
        out.print("no held-out LoRA has words, so nothing was measured")
        return
    owners = np.array([number for number, _ in pairs])
    right = owners[:, None] == np.arange(len(examples))[None, :]
    scores = encoder.read(judge.read([text for _, text in pairs])) @ encoder.encode([example.sketch for example in examples]).T
    found, chance = (metrics.evaluate(values, right, owners) for values in (scores.numpy(), metrics.chance(len(pairs), len(examples))))
    rows = tables.table(f"{len(set(owners.tolist()))} held-out LoRAs among {len(examples):,}", "first", "among five", right=("first", "among five"))
    for name, table in (("weights", found), ("chance", chance)):
        rows.add_row(name, *(_percent(table[measure]) for measure in ("R@1", "R@5")))
    out.print(rows)
    least = 5 / len(examples)
    if found["R@5"].low <= least:
        raise Refused("held-out LoRAs are not found more often than by chance, so no encoder was kept: more LoRAs, better words or `medley index "
                      "--behaviour` would help; --no-check keeps it all the same")  # fmt: skip


def _percent(value: "Estimate") -> str:
    return f"{100 * value.mean:.0f} % ({100 * value.low:.0f} to {100 * value.high:.0f})"
