"""A manifest: JSONL with one request or one finished picture a line, or a folder that has `metadata.jsonl`.

A line with `file_name` is a picture that is there (relative to the manifest, as Hugging Face's imagefolder has it), with its
prompt as `text`. Other lines are requests, with the fields of a Request. Also: `concepts` (phrases, or objects with
`phrase` and, if you like, `name`, `category`, `references`), `group` (what is resampled as one: the prompt, when nothing
else is said), `method` (what made a picture that is there), `text` (what CLIPScore compares with, when it is not the prompt). Columns that
mean nothing here are left alone beside `file_name`. Lines that `medley generate` wrote need nothing added.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.errors import sentence
from app.evaluation.cases import Case, CollectedCases, ExpectedConcept, Problem, clipped
from app.evaluation.variants import SUPPLIED
from composition import Receipt, Refused, Request, manifest, prompt_syntax

CONCEPT = {"phrase", "name", "category", "references"}


def read(source: Path, inspect: Callable[[str], Receipt | None], model: str = "pocket") -> CollectedCases:
    """Cases and what is wrong, line by line; nothing stops at a bad line. Raises Refused when there is no manifest.

    inspect: what a LoRA's file says of itself; raises Refused when there is none (the line is left out). model: for requests
    that name none.
    """
    path = source / "metadata.jsonl" if source.is_dir() else source
    if not path.is_file():
        raise Refused(f"{source} has no metadata.jsonl" if source.is_dir() else f"{source} is not there; give a JSONL manifest, "
                      "or a folder with metadata.jsonl")  # fmt: skip
    collected = CollectedCases()
    seen: dict[tuple[str, str], set[int]] = {}
    for number, line in manifest.texts(path):
        try:
            case = _case(manifest.row_of(line), path.parent, inspect, model, number)
        except Exception as error:  # a name that the system refuses, a file that no reader foresaw: one line's trouble
            collected.problems.append(Problem(str(path), clipped(sentence(error)), number))
            continue
        taken = seen.setdefault((case.group, case.method), set())
        free = case.seed if case.seed >= 0 and case.seed not in taken else max(taken, default=-1) + 1  # no two pictures of one case
        taken.add(free)
        collected.cases.append(replace(case, seed=free))
    if not collected.cases and not collected.problems:
        raise Refused(f"{path} is empty; write one request a line, as {{\"prompt\": \"a fox\", \"seed\": 1}}")
    return collected


def _case(row: dict[str, Any], folder: Path, inspect: Callable[[str], Receipt | None], model: str, line: int) -> Case:
    picture = row.get("file_name")
    request = _request(row, model, supplied=picture is not None)
    path = None
    if picture is not None:
        path = _inside(folder, picture)
        if not os.path.isfile(path):
            raise Refused(f"the picture {picture!r:.200} is missing")
    text = row.get("text", prompt_syntax.words(request) if request else None)
    if not isinstance(text, str) or not text.strip():
        raise Refused('a text is needed: the prompt, as "text" beside file_name or as "prompt" of a request')
    listed = row.get("concepts")
    concepts = _concepts(listed, folder) if listed is not None else _of_loras(request, inspect, finished=path is not None)
    group, method = row.get("group", text), row.get("method", SUPPLIED if path else "")
    if not isinstance(group, str) or not isinstance(method, str):
        raise Refused("group and method are texts")
    for what, words in (("text", text), ("group", group), ("method", method), *(("a concept", f"{c.name} {c.phrase}") for c in concepts)):
        if any("\ud800" <= letter <= "\udfff" for letter in words):
            raise Refused(f"{what} has half a character in it, which no file can hold: write it whole")
    if request and not request.loras and path and "method" not in row:
        method = SUPPLIED
    seed = row.get("seed", -1) if path else (request.seed if request else -1)
    return Case(group, seed if isinstance(seed, int) and not isinstance(seed, bool) else -1, text, concepts, request, method, path, line)


def _request(row: dict[str, Any], model: str, *, supplied: bool) -> Request | None:
    """The request that a line is or holds; None for a picture without one."""
    if supplied and row.get("request") is None:
        return None
    request = manifest.request_of(row, model)
    if supplied:
        return request
    if request.model != model:
        raise Refused(f"this line is for the model {request.model:.200}, and this evaluation runs on {model}: name one with --model, or leave "
                      "it out of the line")  # fmt: skip
    return replace(request, count=1)


def _inside(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise Refused("file_name is the path of a picture")
    if re.match(r"[\\/]|\w:", name) or ".." in re.split(r"[\\/]", name):
        raise Refused(f"{name!r:.200} lies outside the manifest's folder: name pictures inside it")
    return folder / name


def _of_loras(request: Request | None, inspect: Callable[[str], Receipt | None], *, finished: bool) -> tuple[ExpectedConcept, ...]:
    """What each LoRA of a request stands for: its first trigger word, as it or its file says.

    finished: the picture is there, so that a LoRA whose file is elsewhere by now costs its concept and not the picture.
    """
    concepts = []
    for name, lora in zip(request.names, request.loras, strict=True) if request else ():
        try:
            receipt = inspect(lora.source)
        except Refused:
            if not finished:
                raise
            receipt = None
        triggers = lora.triggers or (receipt.triggers if receipt else ())
        if not triggers:
            continue
        category = lora.category or (receipt.category if receipt else "")
        concepts.append(ExpectedConcept(name, phrase(triggers[0], category), category, phrase(triggers[0], category)))
    return tuple(concepts)


def phrase(trigger: str, category: str) -> str:
    """The phrase that a judge looks for, for a trigger word: characters and things as "a raccoon", the rest as it is written."""
    plain = trigger.replace(" ", "").isalpha() and trigger == trigger.lower() and len(trigger.split()) <= 2
    plural = trigger.endswith("s") and not trigger.endswith("ss")
    if category not in ("character", "object", "clothing") or not plain or plural or trigger.split()[0] in ("a", "an", "the"):
        return trigger
    return f"{'an' if trigger[0] in 'aeio' else 'a'} {trigger}"


def _concepts(listed: Any, folder: Path) -> tuple[ExpectedConcept, ...]:
    if not isinstance(listed, list):
        raise Refused("concepts is a list of phrases, or of objects with a phrase")
    return tuple(_concept(entry, folder) for entry in listed)


def _concept(entry: Any, folder: Path) -> ExpectedConcept:
    row = {"phrase": entry} if isinstance(entry, str) else entry
    if not isinstance(row, dict) or not isinstance(row.get("phrase"), str) or not row["phrase"].strip():
        raise Refused(f"a concept is a phrase or an object with a phrase, not {entry!r:.200}")
    if unknown := set(row) - CONCEPT:
        raise Refused(f"a concept has {', '.join(sorted(CONCEPT))}, not {', '.join(sorted(unknown)):.200}")
    references = row.get("references", [])
    if not isinstance(references, list) or not all(isinstance(name, str) for name in references):
        raise Refused(f"references of {row['phrase']!r:.200} is a list of picture files")
    lost = [name for name in references if not os.path.isfile(_inside(folder, name))]
    if lost:
        raise Refused(f"the reference picture {lost[0]!r:.200} of {row['phrase']!r:.200} is missing")
    name, category = row.get("name", row["phrase"]), row.get("category", "")
    if not isinstance(name, str) or not isinstance(category, str):
        raise Refused(f"name and category of {row['phrase']!r:.200} are texts")
    return ExpectedConcept(name, row["phrase"], category, references=tuple(folder / name for name in references))
