"""From scores of pictures to what can be said of methods: means with intervals, paired differences, ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from app.drawing.charts import ALL
from app.evaluation import statistics
from app.evaluation.scoring import METRICS, Metric

Rows = Sequence[Mapping[str, Any]]


def summary(rows: Rows, ways: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """{metric: {size or "all": {"means": way to interval, "pairs": [...], "ranks": way to rank}}}.

    rows: scored pictures with way, group, number and size. Pairs are formed on (group, number); ways as they stand in the
    report. Sizes are told apart only where there are several.
    """
    sizes = sorted({row["size"] for row in rows})
    parts = {ALL: rows} | ({str(size): [row for row in rows if row["size"] == size] for size in sizes} if len(sizes) > 1 else {})
    found: dict[str, Any] = {}
    for metric in METRICS:
        if any(row[metric.key] is not None for row in rows):
            found[metric.key] = {name: _part(part, metric, ways, resamples, seed) for name, part in parts.items()}
    return found


def _part(rows: Rows, metric: Metric, ways: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    scores: dict[str, dict[tuple[str, int], float]] = {}
    means = {}
    for way in ways:
        mine = [row for row in rows if row["way"] == way and row[metric.key] is not None]
        if mine:
            means[way] = statistics.interval([row[metric.key] for row in mine], [row["group"] for row in mine],
                                             resamples=resamples, seed=seed)  # fmt: skip
            scores[way] = {(row["group"], row["number"]): row[metric.key] for row in mine}
    pairs = statistics.paired(scores, resamples=resamples, seed=seed)
    ranks = statistics.ranks({way: one.mean for way, one in means.items()}, pairs, larger=metric.larger)
    return {"means": {way: asdict(one) for way, one in means.items()},
            "pairs": [{**asdict(one), "parted": one.parted} for one in pairs], "ranks": ranks}  # fmt: skip


def mean(found: Mapping[str, Any], metric: str, way: str, part: str = ALL) -> float | None:
    """The mean of a metric for a way, None where there is none."""
    row = found.get(metric, {}).get(part, {}).get("means", {}).get(way)
    return None if row is None else row["mean"]


def per_concept(rows: Rows, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Presence and score of every concept by way, and in how many pictures: which LoRA gets lost."""
    table: dict[str, dict[str, list[tuple[float, bool | None]]]] = {}
    kinds = {}
    for row in rows:
        for concept in row["concepts"]:
            kinds[concept["name"]] = (concept["phrase"], concept["category"])
            table.setdefault(concept["name"], {}).setdefault(row["way"], []).append((concept["score"], concept["present"]))
    made = []
    for name, by_way in sorted(table.items(), key=lambda item: (kinds[item[0]][1], item[0])):
        entry: dict[str, Any] = {"name": name, "phrase": kinds[name][0], "category": kinds[name][1], "ways": {}}
        for way in ways:
            if way in by_way:
                seen = by_way[way]
                known = [present for _, present in seen if present is not None]
                entry["ways"][way] = {"pictures": len(seen), "score": sum(score for score, _ in seen) / len(seen),
                                      "presence": sum(known) / len(known) if known else None}  # fmt: skip
        made.append(entry)
    return made
