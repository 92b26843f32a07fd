"""What the report says in words: the judge's worth, what was tuned, what was left out, the settings."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.evaluation.cases import Problem
from app.evaluation.generate import Picture
from app.evaluation.scoring import FEW, Scorer, formula
from app.evaluation.variants import EQUAL, LORA_ALONE, NONE, title
from composition import Refused, Request, methods, record, untrusted
from composition.methods.shared.dominance import CATEGORY
from composition.methods.shared.measured_order import DEFAULT_MEASURE, MEASURES
from retrieval.judge import CONFUSION

LEAST = 6  # groups from which a permutation test can reach p <= 0.05


def judge(scorer: Scorer, texts: Mapping[str, bool], phrases: Collection[str]) -> dict[str, Any]:
    """Name, formula, texts cut, where thresholds come from, and its own mistakes where its folder tells
    them of a phrase that was asked."""
    own = scorer.judge.thresholds
    known = sorted(set(scorer.thresholds))
    if scorer.settled:
        least = min(scorer.settled.values())
        presence = (f"Presence: thresholds of {len(scorer.settled)} phrases were set on this evaluation's own pictures of cases "
                    f"without them (at least {least}), at 5 % false positives; how many true pictures they find is not known.")  # fmt: skip
    elif known:
        presence = "Presence: a score above the judge's own threshold for the phrase, set on fresh renders at 5 % false positives."
    else:
        presence = (f"Presence is not known: this judge has no thresholds, and fewer than {FEW} pictures without each concept are "
                    "here to set them on.")  # fmt: skip
    table = scorer.judge.folder / CONFUSION if scorer.judge.folder else None
    confusion = _confusion(table) if table and table.is_file() else None
    if confusion and not set(confusion["phrases"]) & set(phrases):
        confusion = None
    recall = {phrase: row.recall for phrase, row in own.items()}
    if confusion:  # recall among other things, as in the pictures scored, not of things alone
        recall |= {phrase: confusion["rows"][place][place] for place, phrase in enumerate(confusion["phrases"])}
    return {
        "name": scorer.judge.name, "formula": formula(scorer.scale), "scale": scorer.scale, "texts": len(texts),
        "cut": sum(texts.values()), "presence": presence, "recall": recall, "confusion": confusion,
    }  # fmt: skip


def _confusion(table: Path) -> dict[str, Any]:
    """The judge's own mistakes: phrases, and a row of shares for each. Raises Refused for a file that is damaged."""
    try:
        confusion = untrusted.parse_file(table)
        phrases, rows = confusion["phrases"], confusion["rows"]
        if not (len(phrases) == len(rows) and all(len(row) == len(phrases) for row in rows)
                and all(isinstance(phrase, str) for phrase in phrases) and all(0 <= share <= 1 for row in rows for share in row)):
            raise ValueError
    except untrusted.Unreadable as error:
        raise Refused(f"{table} {error}") from None
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{table} is no table of a judge's mistakes: expected phrases, and a row of shares from 0 to 1 for each") from None
    return confusion


def remarks(
    tuned: Sequence[Mapping[str, Any]], variants: Sequence[str], second: Sequence[Mapping[str, Any]] | None, groups: int, judge: str
) -> list[str]:
    """Sentences under the table of scores."""
    lines = []
    if groups < LEAST and len(variants) > 1:
        lines.append(f"Only {groups} groups: with fewer than {LEAST} no test can tell two variants apart, and intervals mean little.")
    if judge.startswith("pocket"):
        lines.append("Pocket's judge knows Pocket's world and the names of some 700 emoji, at 64 px; what lies beyond them scores near nothing.")
    for name in dict.fromkeys(row["method"] for row in tuned):
        sizes = [row for row in tuned if row["method"] == name]
        factors = ", ".join(f"{row['factor']:g} for {row['size']} LoRAs{f' at {steps} steps' if (steps := row.get('steps')) else ''}" for row in sizes)
        lines.append(f"{title(name)}: the factor on every weight was tuned on {sum(row['pictures'] for row in sizes)} pictures of other "
                     f"noise: {factors} (of {', '.join(sizes[0]['tried'])}).")  # fmt: skip
    if any(variant.endswith(EQUAL) for variant in variants):
        lines.append("Equal evaluations: as many steps as cost what one evaluation in each plain step costs.")
    if NONE in variants:
        lines.append("Prompt only: the same prompt and noise without any LoRA.")
    if LORA_ALONE in variants:
        lines.append("LoRA alone: the same prompt and noise with the LoRA asked for, at its weight before any tuning, and without the distractors.")
    for pair in second or ():
        lines.append(f"Second opinion: {title(pair['first'])} against {title(pair['second'])}: {pair['first_wins']} to {pair['second_wins']}, "
                     f"{pair['ties']} ties; the order decided {100 * pair['order_decided']:.0f} % (counted as ties).")  # fmt: skip
    return lines


def orders(pictures: Sequence[Picture]) -> list[str]:
    """For every variant whose method orders LoRAs: by what, in how many of its pictures of two LoRAs or more."""
    counts: dict[str, Counter[str]] = {}
    for picture in pictures:
        row = picture.row
        if row.request and picture.request and len(picture.request.loras) > 1 and not row.variant.endswith(EQUAL):
            if order := _order(row.request, picture.request):
                counts.setdefault(row.variant, Counter())[order] += 1
    return [f"{title(variant)}: LoRAs ordered {'; '.join(_of(order, times, kinds.total()) for order, times in kinds.items())}."
            for variant, kinds in counts.items()]  # fmt: skip


def _order(requested: Request, settled: Request) -> str:
    """By what the LoRAs of a settled request are ordered; "" for a method without an order."""
    if "order" not in methods.find(settled.method).options.__dataclass_fields__:
        return ""
    wanted, order = requested.options.get("order", ""), settled.options.get("order", "")
    if wanted == CATEGORY or not order:
        return "by category"
    if order == CATEGORY:
        return "by category, as not all are profiled on this model"
    return f"by the measured {wanted or DEFAULT_MEASURE} of frequency" if wanted in ("", *MEASURES) else "as the option says"


def _of(order: str, times: int, total: int) -> str:
    return order if times == total else f"{order} in {times} of {total} pictures"


def grouped(problems: Sequence[Problem]) -> list[str]:
    """Problems as sentences, the same trouble of many pictures once, those of lines first and in their order."""
    lines = [str(problem) for problem in sorted((problem for problem in problems if problem.line), key=lambda problem: problem.line)]
    whys = Counter(problem.why for problem in problems if not problem.line)
    for why, times in whys.items():
        where = next(problem.where for problem in problems if problem.why == why and not problem.line)
        lines.append(f"{where}: {why}" if times == 1 else f"{where} and {times - 1} more: {why}")
    return lines


def settings(config: Any) -> str:
    """Everything that makes it again, as JSON."""
    scoring = {"judge": config.judge, "scale": config.scale, "resamples": config.resamples, "seed": config.seed, "versions": record.versions()}
    if config.manifest is not None:
        source = {"manifest": str(config.manifest), "methods": list(config.methods), "limit": config.limit, "references": config.references}
        return json.dumps({**source, **scoring}, indent=1)
    like = json.loads(config.like.json())
    kept = {key: like[key] for key in ("model", "negative", "sampler", "steps", "guidance", "size")}
    kept |= {"steps": list(config.steps)} if config.steps else {}
    return json.dumps({
        "testbed": config.testbed, "methods": list(config.methods),
        "options": {name: dict(options) for name, options in config.options.items() if options}, "sizes": list(config.sizes),
        "sets": "all" if config.sets is None else config.sets, "of": config.of, "boxes": config.boxes, "seeds": config.seeds, "limit": config.limit,
        "distractors": list(config.distractors), "choose": config.choose, "weight": config.weight,
        "prefix": config.prefix, "tune": list(config.tune), "references": config.references, **kept, **scoring,
    }, indent=1)  # fmt: skip
