"""The report: scores.jsonl and scores.csv (a row a picture), summary.json, and one HTML page that needs no other file."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, select_autoescape
from PIL import Image

from app.drawing import charts
from app.evaluation.cases import Key, key
from app.evaluation.metrics import COSTS, METRICS, Metric
from app.evaluation.summary import ALL, main_parts, part_title
from composition import Refused, atomic, pictures

HERE = Path(__file__).parent
THUMB = 128  # pixels of a picture's longer side in the page
SHOWN = 1500  # pictures in the page's grid; the files have them all
WORST = 4  # cases shown as worst and as best of each variant
FILES = ("scores.jsonl", "scores.csv", "summary.json", "index.html")


def write(folder: Path, rows: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> Path:
    """All files of the report, each whole or not at all; returns the page. rows: a scored picture each, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / FILES[0], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    atomic.write(folder / FILES[1], table(rows))
    atomic.write(folder / FILES[2], json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    return atomic.write(folder / FILES[3], page(folder, rows, document))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV: what a picture is, its scores, and for each of its concepts the score and the presence."""
    plain = ["id", "variant", "group", "number", "size", "steps", "seed", "prompt", "picture", "cut", *(metric.key for metric in METRICS)]
    kinds = ("concept", "distractor")
    most = {kind: max((len(row[f"{kind}s"]) for row in rows), default=0) for kind in kinds}
    heads = [f"{kind}{k + 1}{part}" for kind in kinds for k in range(most[kind]) for part in ("", "_score", "_present")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *heads])
    for row in rows:
        cells = [_guarded(row[key]) for key in plain]
        for kind in kinds:
            for concept in row[f"{kind}s"]:
                cells += [_guarded(concept["name"]), concept["score"], concept["present"]]
            cells += [None] * (3 * (most[kind] - len(row[f"{kind}s"])))
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def _guarded(cell: Any) -> Any:
    """Text that a spreadsheet would run as a formula, with a quote before it."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def page(folder: Path, rows: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> str:
    """The HTML page: style, script and small pictures inside."""
    environment = Environment(autoescape=select_autoescape(default=True, default_for_string=True), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": shown, "chance": chance, "part": part_title}
    variants, titles, summary = document["variants"], document["titles"], document["metrics"]
    metrics = [metric for metric in METRICS if metric.key in summary]
    cases = grid(rows, variants)
    kept = cases[: max(1, SHOWN // max(1, len(variants)))]
    extremes = worst_and_best(cases, variants)
    wanted = {row["id"]: row for case in [*kept, *(case for pair in extremes.values() for side in pair for case in side)]
              for row in case["cells"].values()}  # fmt: skip
    thumbs = {name: thumb(folder / row["picture"]) for name, row in wanted.items()}
    compared = main_parts(document)
    parts = list(dict.fromkeys([*compared, *next(iter(summary.values()))]))
    plots, against = _plots(document, metrics)
    inside = {name: {"request": row["request"], "picture": row["picture"], "scores": _scores(row)} for name, row in wanted.items()}
    return environment.from_string((HERE / "report.html").read_text("utf-8")).render(
        document=document, metrics=metrics, costs=COSTS, compared=compared, against=against,
        sections=[_section(section, compared) for section in document["sections"]],
        variants=variants, titles=titles, parts=parts, summary=summary, plots=plots, cases=kept,
        cases_in_all=len(cases), extremes=extremes, thumbs=thumbs, style=(HERE / "report.css").read_text("utf-8"),
        script=(HERE / "report.js").read_text("utf-8"), inside=_embedded(inside), colours=charts.colours(variants),
        size_word="LoRAs" if any(row["request"] for row in rows) else "concepts")  # fmt: skip


def _section(section: Mapping[str, Any], compared: Sequence[str]) -> dict[str, Any]:
    """A section as the page takes it: its columns as metrics, and the parts that are open."""
    shown = [part for part in compared if part in section["parts"]] or list(section["parts"])[:1]
    parts = {part: section["parts"][part] for part in dict.fromkeys([*shown, *section["parts"]])}
    return {**section, "columns": [Metric(**column) for column in section["columns"]], "parts": parts, "open": shown}


def _plots(document: Mapping[str, Any], metrics: Sequence[Metric]) -> tuple[list[tuple[Metric, str]], str]:
    """A chart of every metric, and what it is against: numbers of steps, else numbers of LoRAs, else nothing: a mark a variant."""
    variants, titles, summary = document["variants"], document["titles"], document["metrics"]
    for unit, several, name in (("steps", document["steps"], "{} steps"), ("LoRAs", document["sizes"], "{}")):
        if len(several) > 1:
            parts = {metric: {str(number): summary[metric.key][name.format(number)] for number in several} for metric in metrics}
            return [(metric, charts.lines(parts[metric], variants, titles, metric, unit)) for metric in metrics], unit
    return [(metric, charts.bars(summary[metric.key][ALL], variants, titles, metric)) for metric in metrics], ""


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    concepts = [{"concept": c["phrase"], "score": round(c["score"], 2), "present": c["present"]} for c in row["concepts"]]
    distractors = [{"distractor": c["phrase"], "score": round(c["score"], 2), "present": c["present"]} for c in row["distractors"]]
    known = {metric.key: row[metric.key] for metric in METRICS if row[metric.key] is not None}
    return known | {"concepts": concepts} | ({"distractors": distractors} if distractors else {})


def _embedded(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def grid(rows: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> list[dict[str, Any]]:
    """One entry a case, in order: prompt, size, steps where several numbers are compared, and variant to row."""
    cases: dict[Key, dict[str, Any]] = {}
    for row in rows:
        case = cases.setdefault(key(row), {
            "group": row["group"], "number": row["number"], "size": row["size"], "steps": row["steps"], "prompt": row["text"], "cells": {}})  # fmt: skip
        case["cells"].setdefault(row["variant"], row)
    for case in cases.values():
        case["cells"] = {variant: case["cells"][variant] for variant in variants if variant in case["cells"]}
    return list(cases.values())


def worst_and_best(cases: Sequence[dict[str, Any]], variants: Sequence[str]) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Variant to its worst and its best cases: by presence where it is known, then by CLIPScore."""
    extremes = {}
    for variant in variants:
        mine = [case for case in cases if variant in case["cells"]]
        mine.sort(key=lambda case: (case["cells"][variant]["presence"] or 0.0, case["cells"][variant]["clipscore"]))
        count = min(WORST, len(mine) // 2)
        if count:
            extremes[variant] = (mine[:count], mine[::-1][:count])
    return extremes


def thumb(path: Path) -> str:
    """A small WebP of a picture as a data address; "" when it is gone."""
    try:
        small = pictures.load(path).convert("RGB")
    except (Refused, OSError):
        return ""
    small.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def shown(value: float | None, metric: Any) -> str:
    """A score as people read it: percent for shares."""
    if value is None:
        return "-"
    return f"{100 * value if metric.share else value:.{metric.digits}f}{' %' if metric.share else ''}"


def chance(p: float) -> str:
    """A p value: three digits, or that it is smaller."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
