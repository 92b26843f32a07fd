"""The index of LoRAs at 1,000, 10,000 and 100,000 cards: writing it, opening it, and searching it in memory and through LanceDB.

    python -m tests.bench.retrieval [--cards 1000,10000,100000] [--queries 200] [--width 256]

Every card has words and, four times out of five, a vector in each of the three spaces. A query has a vector for each, three words, and a
family in every second one. The two engines are interleaved with one pass of numpy over a space's vectors in single precision, whose
spread is the machine's own noise. CPU is the time of all threads of the process: what a query costs where others use the cores too.
Recall is the share of the 10 (100) nearest vectors that LanceDB's index finds; in memory it is 1 by construction, and checked.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from retrieval import indexed
from retrieval.exact import cosines
from retrieval.index import Index
from retrieval.rows import SPACES, Filter, Row, Space
from retrieval.words import parse

BATCH = 5000
VOCABULARY = 20_000
FAMILIES = {"sd": 0.4, "sdxl": 0.3, "flux": 0.2, "sd3": 0.1}
SHARE = 0.8  # of the cards that have a vector, in each space
CLUSTER = 50  # cards about one thing


class Library:
    """Cards in clusters: vectors lie about their cluster's, words are Zipf's."""

    def __init__(self, cards: int, width: int) -> None:
        self.cards, self.width, self.rng = cards, width, np.random.default_rng(0)
        self.centres = {space: self._unit(self.rng.standard_normal((max(cards // CLUSTER, 1), width))) for space in SPACES}
        self.share = 1 / np.arange(1, VOCABULARY + 1)
        self.share /= self.share.sum()

    def _unit(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)

    def near(self, cluster: int, space: Space) -> np.ndarray:
        return self._unit(self.centres[space][cluster] + self.rng.standard_normal(self.width) / self.width**0.5)

    def words(self, count: int) -> str:
        return " ".join(f"word{number}" for number in self.rng.choice(VOCABULARY, count, p=self.share))

    def rows(self) -> Iterator[list[Row]]:
        for start in range(0, self.cards, BATCH):
            yield [self._row(number) for number in range(start, min(start + BATCH, self.cards))]

    def _row(self, number: int) -> Row:
        cluster = number % len(self.centres["text"])
        vectors = {space: self.near(cluster, space) for space in SPACES if self.rng.random() < SHARE}
        family = self.rng.choice(list(FAMILIES), p=list(FAMILIES.values()))
        return Row(f"{number:064x}", (f"/loras/{number}.safetensors",), f"lora{number}", family=str(family), words=self.words(20), **vectors)

    def query(self, number: int) -> tuple[dict[Space, np.ndarray], str, Filter]:
        cluster = int(self.rng.integers(len(self.centres["text"])))
        return {space: self.near(cluster, space) for space in SPACES}, self.words(3), Filter("sdxl" if number % 2 else None)


def clock(call: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) milliseconds."""
    cpu, begun = time.process_time(), time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun), 1e3 * (time.process_time() - cpu)


def measure(cards: int, queries: int, width: int) -> None:
    library = Library(cards, width)
    with tempfile.TemporaryDirectory() as folder:
        memory = Index(folder)
        wrote = np.sum([clock(lambda rows=rows: memory.upsert(rows)) for rows in library.rows()], 0)  # drawing the cards is not counted
        merged = clock(memory.optimise)
        lance = Index(folder, exact_rows=0)
        built = clock(lance.optimise)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20
        print(f"\n{cards:,} cards, {width} numbers a vector, {size:.0f} MiB on disk. Seconds, wall (CPU):")
        print(f"  written {_seconds(wrote)}, merged {_seconds(merged)}, LanceDB's indices {_seconds(built)}")
        questions = [library.query(number) for number in range(queries)]
        first = {}
        for name, index in (("in memory", Index(folder)), ("LanceDB", Index(folder, exact_rows=0))):
            first[name] = clock(lambda index=index: index.search(*questions[0]))
        print("  first search " + ", ".join(f"{name} {_seconds(times)}" for name, times in first.items()))
        vectors = memory.vectors("weight")[1]
        arms = {
            "in memory": lambda question: memory.search(*question),
            "LanceDB": lambda question: lance.search(*question),
            "words alone, in memory": lambda question: memory.search(None, *question[1:]),
            "words alone, LanceDB": lambda question: lance.search(None, *question[1:]),
            "numpy, one space, float32": lambda question: vectors @ question[0]["weight"],
        }
        for arm in arms.values():
            arm(questions[0])
        times = _interleaved(arms, questions)
        print(f"  {'milliseconds a query':28}{'p50':>8}{'p95':>8}{'CPU p50':>10}{'CPU p95':>9}")
        for name, measured in times.items():
            wall, cpu = np.quantile(measured, (0.5, 0.95), axis=0).T
            print(f"  {name:28}{wall[0]:8.1f}{wall[1]:8.1f}{cpu[0]:10.1f}{cpu[1]:9.1f}")
        print("  recall at 10, at 100: " + ", ".join(f"{name} {near:.3f}, {far:.3f}" for name, near, far in recalls(memory, lance, vectors, questions)))


def _interleaved(arms: dict, questions: list) -> dict[str, np.ndarray]:
    rounds = [[clock(lambda arm=arm, question=question: arm(question)) for arm in arms.values()] for question in questions]
    return dict(zip(arms, np.array(rounds).transpose(1, 0, 2), strict=True))


def recalls(memory: Index, lance: Index, vectors: np.ndarray, questions: list) -> Iterator[tuple[str, float, float]]:
    """(engine, recall at 10, at 100) against comparing every weight vector, over the first queries."""
    ids, nothing = memory.vectors("weight")[0], parse("")
    shares = {"in memory": [], "LanceDB": []}
    for question, _, _ in questions[:50]:
        order = np.argsort(-cosines(vectors, question["weight"]), kind="stable")
        query = {"weight": question["weight"]}
        orders = {
            "in memory": memory._current().exact.search(query, nothing, Filter(), 100),  # type: ignore[union-attr]
            "LanceDB": indexed.search(lance._table, query, nothing, Filter(), 100),
        }
        for name, ranked in orders.items():
            got = [row for row, _ in ranked["weight"]]
            shares[name].append([len({ids[place] for place in order[:k]} & set(got[:k])) / min(k, len(order)) for k in (10, 100)])
    for name, share in shares.items():
        yield name, *np.mean(share, 0)


def _seconds(times) -> str:
    return f"{times[0] / 1e3:.2f} ({times[1] / 1e3:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", default="1000,10000,100000")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    arguments = parser.parse_args()
    for cards in map(int, arguments.cards.split(",")):
        measure(cards, arguments.queries, arguments.width)


if __name__ == "__main__":
    main()
