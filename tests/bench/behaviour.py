"""``python -m tests.bench.behaviour``: how often a bundled LoRA's own words find it by its behaviour, and what that costs.

Draws the probe once and reads it in parts: by each prompt alone and by all, with as many seeds as there are and with fewer.
"""

import argparse
import time

import numpy as np

from app.evaluation import testbed
from composition import Engine, Lora
from composition.profiles.behaviour import Probe
from composition.profiling import behaviour as measuring
from composition.profiling.behaviour import POCKET
from retrieval import behaviour
from retrieval.judge import Judge


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.behaviour", description=__doc__)
    parser.add_argument("--prompt", action="append", help="repeat for more; those of Medley's own probe when there is none")
    parser.add_argument("--seeds", type=int, default=POCKET.seeds)
    parser.add_argument("--steps", type=int, default=POCKET.steps)
    parser.add_argument("--guidance", type=float, default=POCKET.guidance)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    probe = Probe(tuple(args.prompt or POCKET.prompts), args.seeds, args.steps, args.guidance)
    judge, phrases = Judge.open(), {entry.id: entry.concept.phrase for rows in testbed.read("pocket").values() for entry in rows}
    queries = np.stack([behaviour.direction(lambda texts: judge.read(texts).numpy(), phrase, behaviour.POCKET) for phrase in phrases.values()])
    with Engine.open("pocket", device="cpu", together=2) as engine:
        see = lambda pictures: judge.see(pictures).numpy()  # noqa: E731
        base, begun = measuring.seen(engine, see, probe), time.process_time()
        moved = np.stack([measuring.seen(engine, see, probe, Lora(name)) - base for name in phrases])  # (LoRAs, pictures, D)
        seconds = (time.process_time() - begun) / len(moved)
    print(f"{len(moved)} LoRAs, {probe.pictures} pictures of {probe.steps} steps, guidance {probe.guidance}: {seconds:.1f} core-seconds a LoRA")
    moved = moved.reshape(len(moved), len(probe.prompts), probe.seeds, -1)
    for seeds in sorted({1, max(1, probe.seeds // 2), probe.seeds}):
        for title, part in [*((repr(prompt), slice(i, i + 1)) for i, prompt in enumerate(probe.prompts)), ("all prompts", slice(None))]:
            directions = moved[:, part, :seeds].mean((1, 2))
            ranks = [int((row > row[k]).sum()) for k, row in enumerate(np.stack([behaviour.scores(query, directions) for query in queries]))]
            lost = ", ".join(name for name, rank in zip(phrases, ranks, strict=True) if rank)
            print(f"{title:>20}, {seeds} seeds: R@1 {100 * np.mean([rank == 0 for rank in ranks]):3.0f} %, MRR {np.mean([1 / (1 + rank) for rank in ranks]):.3f}"
                  f"{'; not first: ' + lost if lost else ''}")  # fmt: skip


if __name__ == "__main__":
    main()
