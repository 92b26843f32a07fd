"""`medley evaluate`: methods on a testbed or a manifest, scored, with intervals, as a report. The flags; the work is in
app.evaluation."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from app import engines, options
from app.cli.tables import table
from app.terminal import Terminal, err, out, printable
from composition import Refused, Request, record
from composition.bundled import BUNDLES

if TYPE_CHECKING:
    from app.evaluation.config import EvaluationConfig
    from app.evaluation.metrics import Metric
    from app.evaluation.run import Outcome

METHODS, SIZES, REPORT = "merge,switch,composite", "2-5", Path("evaluation")
BELOW, LEFT_OUT = 1, 3  # exit codes
MOST = 1000  # letters that a printed table may be wide; a narrower terminal wraps them
SHOWN = ("presence", "all_present", "clipscore", "concept_min", "clip_i", "leakage", "evaluations", "seconds")

EPILOG = ("The prompt alone is always one of the variants. The same command goes on where it was stopped. Exit code 0: done; 1: a mean is "
          "below its --fail-below; 3: done, but something was left out (it is listed); 2: nothing was done.")  # fmt: skip


def evaluate(
    manifest: Annotated[Path | None, typer.Argument(help="JSONL with a request or a picture a line, or a folder with "
                                                    "metadata.jsonl; instead of --testbed.")] = None,
    testbed: Annotated[str | None, typer.Option(help="pocket, pocket-flux, or a *_lora_info.json file as ComposLoRA has it.")] = None,
    methods: Annotated[str | None, typer.Option(help=f"Which, as none,merge:anchored=true,cmlora:cache=false ({METHODS}; a manifest's lines "
                                                "say their own).")] = None,
    loras: Annotated[str | None, typer.Option(metavar="SIZES", help=f"Sizes of the sets, as 2,3 or 2-5 ({SIZES}).")] = None,
    sets: Annotated[str, typer.Option(help="Sets of each size, drawn evenly, or all.")] = "24",
    distractors: Annotated[str | None, typer.Option(metavar="N", help="Ask for one concept at a time, with N other LoRAs loaded that the prompt "
                                                    "does not name, in place of sets: 4, or 2,4 to compare.")] = None,
    choose: Annotated[str, typer.Option(help="Who chooses the LoRAs of a prompt: set (those it was written for), or retrieval "
                                        "(those that Medley suggests, as generate --auto does).")] = "set",
    of: Annotated[str, typer.Option(metavar="CATEGORY", help="Sets of LoRAs of this category alone, as character.")] = "",
    boxes: Annotated[bool, typer.Option("--boxes", help="Give a set's LoRAs regions side by side.")] = False,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Noise seeds for each set, the same for every method.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many prompts, each with its noise, evenly over the sizes.")] = None,
    report: Annotated[Path, typer.Option("--report", "-o", help="Folder for pictures and report.")] = REPORT,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the methods that have "
                                                     "it.")] = None,
    tune: Annotated[str, typer.Option(help="Methods whose weight is tuned on other noise first, or none.")] = "merge",
    weight: Annotated[float, typer.Option(help="Every LoRA's weight, where none is tuned.")] = 1.0,
    equal: Annotated[bool, typer.Option("--equal/--no-equal", help="Also make methods of several evaluations a step with fewer "
                                        "steps, at one's cost.")] = True,
    judge: Annotated[str, typer.Option(help="pocket, a folder, an open-clip model as MODEL:WEIGHTS, or hf-hub:OWNER/NAME.")] = "pocket",
    scale: Annotated[str, typer.Option(help="CLIPScore as 100 (times cosine), 2.5 (Hessel), or cos.")] = "100",
    references: Annotated[int, typer.Option(min=0, max=64, help="Pictures of each LoRA alone, for CLIP-I; 0 for none.")] = 4,
    fail_below: Annotated[list[str] | None, typer.Option(metavar="[METHOD:]METRIC=VALUE", help="Exit code 1 when a mean is below. "
                                                         "Repeat for more.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base, as for generate (a bundled testbed's own, else pocket).")] = None,
    prefix: Annotated[str, typer.Option(help="Put before every prompt; not scored.")] = "",
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    steps: Annotated[str | None, typer.Option(metavar="N", help="Denoising steps (the model's own); 4,8,25 compares several.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale (the model's own); 1 or less is off.")] = None,
    sampler: Annotated[str, typer.Option(help="Sampler by name (the model's own).")] = "default",
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels (the model's own).")] = None,
    resamples: Annotated[int, typer.Option(min=100, max=1_000_000, help="For intervals and tests.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of sets and of the resampling.")] = 0,
    lora_dir: Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder in which LoRAs are found by name.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (the best there is).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16 (what suits the device).")] = None,
    offload: Annotated[str, typer.Option("--offload", help="auto, none, model, sequential or group.")] = "auto",
    mllm: Annotated[str, typer.Option("--mllm", metavar="URL", help="Also ask a multimodal model at this OpenAI-compatible endpoint which "
                                      "of two pictures is better (key: MEDLEY_MLLM_KEY). Without it nothing is asked anywhere.")] = "",
    mllm_model: Annotated[str, typer.Option(help="That model's name.")] = "",
    mllm_pairs: Annotated[int, typer.Option(min=1, help="Prompts it is asked about, for each two methods.")] = 50,
) -> None:
    """Compare methods on many LoRA sets, with intervals and paired tests, as a report in the browser."""
    if (manifest is None) == (testbed is None):
        raise Refused("give either a manifest or --testbed: medley evaluate --testbed pocket")
    record.ready(report)
    model = model or (testbed if testbed and testbed in BUNDLES else "pocket")
    engines.prepare(model, judge=judge)
    bars = [_bar(text) for text in fail_below or []]
    config = _config(
        manifest=manifest, testbed=testbed or "", methods=methods, sizes=loras, sets=sets, option=option or [], tune=tune, scale=scale,
        distractors=distractors, choose=choose, steps=steps,
        like=Request(prompt="", model=model, negative=negative, guidance=guidance, sampler=sampler,
                     size=options.size(size) if size else None),
        folder=report, of=of, boxes=boxes, seeds=seeds, limit=limit, weight=weight, prefix=prefix, equal=equal, references=references, judge=judge,
        resamples=resamples, seed=seed, place=engines.EngineOptions(device, dtype, offload, engines.folders(lora_dir or [])),
        endpoint=_endpoint(mllm, mllm_model), pairs=mllm_pairs)  # fmt: skip
    from app.evaluation.run import Evaluation
    from app.evaluation.summary import below

    outcome = Evaluation(config, err).run()
    _say(outcome)
    missed = below(outcome.document, bars)
    for line in missed:
        err.print(Text(f"medley: {line}", style="red"))
    if missed or outcome.problems:
        raise typer.Exit(BELOW if missed else LEFT_OUT)


def _config(
    *, methods: str | None, sizes: str | None, sets: str, distractors: str | None, steps: str | None, option: Sequence[str], tune: str, scale: str,
    like: Request, **plain: Any,
) -> "EvaluationConfig":  # fmt: skip
    """The flags, checked. Raises Refused before anything is opened."""
    from app.evaluation import choice, variants
    from app.evaluation.config import EvaluationConfig
    from composition.backbones import schedulers
    from retrieval.judge import SCALES

    read = variants.read_methods(methods if methods is not None else METHODS if plain["testbed"] else "", option)
    tuned = [name for name in variants.read_methods(tune) if name in read]
    if scale not in SCALES:
        raise Refused(f"--scale {scale}: choose from {', '.join(SCALES)}")
    if not re.fullmatch(r"all|[1-9]\d{0,5}", sets.strip()):
        raise Refused(f"--sets {sets}: a number, or all")
    if plain["choose"] not in (choice.SET, choice.RETRIEVAL):
        raise Refused(f"--choose {plain['choose']:.100}: choose from {choice.SET}, {choice.RETRIEVAL}")
    lengths = variants.numbers(steps, "--steps") if steps is not None else []
    if 0 in lengths:
        raise Refused(f"--steps {steps}: a picture takes at least 1")
    if distractors is not None:
        for flag, value in (("--loras", sizes), ("--boxes", plain["boxes"]), ("--choose retrieval", plain["choose"] == choice.RETRIEVAL)):
            if value:
                raise Refused(f"--distractors asks for one concept at a time: leave out {flag}")
        if sets.strip() == "all":
            raise Refused("--distractors with --sets all: there are too many; give a number")
    if plain["boxes"] and plain["choose"] == choice.RETRIEVAL:
        raise Refused("--boxes gives the LoRAs of sets regions: leave it out with --choose retrieval")
    for flag, value in (("--distractors", distractors), ("--choose retrieval", plain["choose"] == choice.RETRIEVAL),
                        ("--steps with several numbers", len(lengths) > 1)):  # fmt: skip
        if value and not plain["testbed"]:
            raise Refused(f"{flag} needs --testbed")
    schedulers.named(like.sampler)
    return EvaluationConfig(
        methods=tuple(read), options=read, sizes=tuple(variants.numbers(sizes or SIZES, "--loras")), sets=None if sets.strip() == "all" else int(sets),
        distractors=tuple(variants.numbers(distractors, "--distractors")) if distractors is not None else (),
        like=replace(like, steps=max(lengths, default=None)), steps=tuple(lengths) if len(lengths) > 1 else (), tune=tuple(tuned), scale=scale, **plain)  # fmt: skip


def _bar(text: str) -> tuple[str, str, float]:
    """METHOD:METRIC=VALUE or METRIC=VALUE."""
    from app.evaluation.metrics import METRICS

    match = re.fullmatch(r"(?:([^:=]+):)?([a-z_]+)=(.+)", text.strip())
    known = [metric.key for metric in METRICS if metric.larger]
    if not match or match[2] not in known:
        raise Refused(f"--fail-below {text:.200}: write METRIC=VALUE or METHOD:METRIC=VALUE, with one of {', '.join(known)}")
    try:
        bar = float(match[3])
    except ValueError:
        bar = math.nan
    if not math.isfinite(bar):
        raise Refused(f"--fail-below {text:.200}: {match[3]:.100} is not a number that a mean could reach or miss")
    return (match[1] or "").strip(), match[2], bar


def _endpoint(url: str, model: str) -> Any:
    from app.evaluation.mllm import Endpoint

    if model and not url:
        raise Refused("--mllm-model needs --mllm: the endpoint's address")
    return Endpoint.read(url, model) if url else None


def _say(outcome: "Outcome") -> None:
    """The means, what was left out, and where the report is."""
    from app.evaluation.metrics import METRICS, Metric
    from app.evaluation.summary import ALL, main_parts, part_title

    document = outcome.document
    summary, parts = document["metrics"], main_parts(document)
    metrics = [metric for key in SHOWN for metric in METRICS if metric.key == key and key in summary]
    grids = [_means(part_title(part) if len(parts) > 1 else "", metrics, {
        variant: {metric.key: summary[metric.key][part]["means"].get(variant) for metric in metrics} for variant in document["variants"]},
        document["titles"]) for part in parts]  # fmt: skip
    for section in document["sections"]:
        columns = [Metric(**column) for column in section["columns"]]
        for part in [part for part in parts if part in section["parts"]] or [ALL]:
            title = section["title"] if part == ALL else f"{section['title']}, {part}"
            grids.append(_means(title, columns, section["parts"][part], document["titles"]))
    for grid in grids:
        Terminal(width=max(out.width, Measurement.get(out, out.options.update(width=MOST), grid).maximum)).print(grid)  # a narrower print would cut numbers
        out.print()
    for line in document["remarks"]:
        out.print(Text(printable(line), style="dim"))
    for line in document["problems"]:
        err.print(Text(printable(f"left out: {line}"), style="yellow"))
    out.print(Text(f"report: {outcome.page}"))


def _means(title: str, metrics: Sequence["Metric"], rows: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Table:
    """Means with their intervals: a row a variant. rows: variant to a metric's key to its interval, None or missing where there is none."""
    from app.evaluation.metrics import COSTS
    from app.evaluation.report import shown

    heads = [metric.title.replace(", ", ",\n") for metric in metrics]
    grid = table(title.replace(", ", ",\n"), *heads, right=heads)
    for variant, means in rows.items():
        cells = []
        for metric in metrics:
            mean = means.get(metric.key)
            cells.append("-" if mean is None else shown(mean["mean"], metric))
            if mean is not None and mean["low"] is not None and metric.key not in COSTS:
                ends = [shown(mean[end], metric).removesuffix(" %") for end in ("low", "high")]
                cells[-1] += f"\n{'..'.join(ends)}"
        grid.add_row(Text(titles[variant]), *map(Text, cells))
    for column in grid.columns:
        column.no_wrap = True
    return grid
