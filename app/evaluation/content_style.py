"""Content and style of a picture of both, and their harmonic mean: a method that keeps one at the price of the other scores low.

NP-LoRA's table (arXiv 2511.11051) has the harmonic mean of averages over pictures. Here it is of each picture, so that methods can be compared
on the same prompt and noise; the mean over pictures is never larger than the harmonic mean of the averages.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from app.evaluation.metrics import CONTENT_STYLE, METRICS, Metric
from app.evaluation.sections import Rows, Section, intervals

CONTENT, STYLE = ("character", "object", "clothing"), "style"  # categories
MEASURES = {"presence": "present", "clip_t": "score", "clip_i": "clip_i"}  # a measure to the key of a scored concept
TITLES = {"presence": "presence", "clip_t": "CLIP-T", "clip_i": "CLIP-I"}


def scores(concepts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The harmonic means of one picture, by key of METRICS; None where it has no content, no style, or one that is not known."""
    means: dict[str, float | None] = {}
    for measure in MEASURES:
        both = sides(concepts, measure)
        means[f"harmonic_{measure}"] = harmonic(*both) if both else None
    return means


def sides(concepts: Sequence[Mapping[str, Any]], measure: str) -> tuple[float, float] | None:
    """The means over one picture's concepts that are content, and over those that are style."""
    content, style = ([concept[MEASURES[measure]] for concept in concepts if (concept["category"] in kinds)] for kinds in (CONTENT, (STYLE,)))
    if not content or not style or None in content or None in style:
        return None
    return sum(content) / len(content), sum(style) / len(style)


def harmonic(first: float, second: float) -> float:
    """2 / (1/first + 1/second); 0 where one of them is not above 0."""
    return 2 * first * second / (first + second) if first > 0 and second > 0 else 0.0


def section(parts: Mapping[str, Rows], variants: Sequence[str], **resampling: int) -> Section | None:
    """Content, style and their harmonic mean by variant, over the pictures of sets that have both; None where none has.

    parts: names of parts of the pictures to their rows. resampling: `resamples` and `seed`.
    """
    columns = []
    for measure, what in TITLES.items():
        share, digits = measure == "presence", 1 if measure == "presence" else 2
        columns += [Metric(f"{side}_{measure}", f"{side.capitalize()}, {what}", f"mean {what} of the concepts that are {side}", share=share, digits=digits)
                    for side in ("content", "style")]  # fmt: skip
        columns += [metric for metric in METRICS if metric.key == f"harmonic_{measure}"]

    def value(row: Mapping[str, Any], column: Metric) -> float | None:
        side, _, measure = column.key.partition("_")
        if side == "harmonic":
            return row[column.key]
        both = sides(row["concepts"], measure)
        return both[side == "style"] if both else None

    tables = {name: {variant: intervals([row for row in rows if row["variant"] == variant], columns, value, **resampling) for variant in variants}
              for name, rows in parts.items()}  # fmt: skip
    about = ("Over the pictures of sets that have both content (character, object, clothing) and a style. Each picture's harmonic mean is high only "
             "when both are; the columns are means over pictures.")  # fmt: skip
    return Section.of(CONTENT_STYLE, "Content and style", about, columns, tables)
