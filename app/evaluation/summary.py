"""From scores of pictures to what can be said of methods: means with intervals, paired differences, ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from app.drawing.charts import ALL
from app.evaluation import statistics
from app.evaluation.cases import Key, key
from app.evaluation.metrics import METRICS, Metric
from app.evaluation.sections import Rows
from app.evaluation.variants import REFERENCES, title


def summary(rows: Rows, variants: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """{metric: {part: {"means": variant to interval, "pairs": [...], "ranks": variant to rank}}}, with the parts of `parts_of`.

    rows: scored pictures with variant, group, number and size. Pairs are formed on the same case; variants as they stand in the report.
    """
    parts = parts_of(rows)
    metrics: dict[str, Any] = {}
    for metric in METRICS:
        if any(row[metric.key] is not None for row in rows):
            metrics[metric.key] = {name: _part(part, metric, variants, resamples, seed) for name, part in parts.items()}
    return metrics


def parts_of(rows: Rows) -> dict[str, Rows]:
    """All rows, those of each size ("3"), of each number of steps ("8 steps") and of both ("3 LoRAs, 8 steps"), where there are several."""
    sizes, steps = sorted({row["size"] for row in rows}), sorted({row.get("steps") or 0 for row in rows})
    parts: dict[str, Rows] = {ALL: rows}
    if len(sizes) > 1:
        parts |= {str(size): [row for row in rows if row["size"] == size] for size in sizes}
    if len(steps) > 1:
        parts |= {f"{number} steps": [row for row in rows if row["steps"] == number] for number in steps}
    if len(sizes) > 1 and len(steps) > 1:
        parts |= {f"{size} LoRAs, {number} steps": [row for row in rows if (row["size"], row["steps"]) == (size, number)] for size in sizes for number in steps}
    return parts


def main_parts(document: Mapping[str, Any]) -> list[str]:
    """The parts that methods are compared on first: each number of steps, where there are several, else all pictures."""
    return [f"{number} steps" for number in document["steps"]] if len(document["steps"]) > 1 else [ALL]


def part_title(part: str) -> str:
    """A part as a heading."""
    return f"{part} LoRAs" if part.isdigit() else "All pictures" if part == ALL else part


def _part(rows: Rows, metric: Metric, variants: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    scores: dict[str, dict[Key, float]] = {}
    means = {}
    for variant in variants:
        mine = [row for row in rows if row["variant"] == variant and row[metric.key] is not None]
        if mine:
            means[variant] = statistics.interval([row[metric.key] for row in mine], [row["group"] for row in mine],
                                             resamples=resamples, seed=seed)  # fmt: skip
            scores[variant] = {key(row): row[metric.key] for row in mine}
    pairs = statistics.paired(scores, resamples=resamples, seed=seed)
    ranks = statistics.ranks({variant: interval.mean for variant, interval in means.items()}, pairs, larger=metric.larger)
    return {"means": {variant: asdict(interval) for variant, interval in means.items()},
            "pairs": [{**asdict(pair), "significant": pair.significant} for pair in pairs], "ranks": ranks}  # fmt: skip


def mean(metrics: Mapping[str, Any], metric: str, variant: str, part: str = ALL) -> float | None:
    """The mean of a metric for a variant, None where there is none."""
    row = metrics.get(metric, {}).get(part, {}).get("means", {}).get(variant)
    return None if row is None else row["mean"]


def per_concept(rows: Rows, variants: Sequence[str], which: str = "concepts") -> list[dict[str, Any]]:
    """Presence and score of every concept by variant, and in how many pictures: which LoRA gets lost; or of every distractor: which shows."""
    table: dict[str, dict[str, list[tuple[float, bool | None]]]] = {}
    kinds = {}
    for row in rows:
        for concept in row[which]:
            kinds[concept["name"]] = (concept["phrase"], concept["category"])
            table.setdefault(concept["name"], {}).setdefault(row["variant"], []).append((concept["score"], concept["present"]))
    concepts = []
    for name, by_variant in sorted(table.items(), key=lambda item: (kinds[item[0]][1], item[0])):
        entry: dict[str, Any] = {"name": name, "phrase": kinds[name][0], "category": kinds[name][1], "variants": {}}
        for variant in variants:
            if variant in by_variant:
                seen = by_variant[variant]
                known = [present for _, present in seen if present is not None]
                entry["variants"][variant] = {"pictures": len(seen), "score": sum(score for score, _ in seen) / len(seen),
                                      "presence": sum(known) / len(known) if known else None}  # fmt: skip
        concepts.append(entry)
    return concepts


def below(document: Mapping[str, Any], bars: Sequence[tuple[str, str, float]]) -> list[str]:
    """What does not reach its bar, as sentences: (variant or "" for every method, metric, value)."""
    missed = []
    for variant, metric, bar in bars:
        for name in [variant] if variant else [variant for variant in document["variants"] if variant not in REFERENCES]:
            value = mean(document["metrics"], metric, name)
            if value is None or value < bar:
                missed.append(f"{metric} of {title(name)} is {'not known' if value is None else f'{value:.4g}'}, below {bar:g}")
    return missed
