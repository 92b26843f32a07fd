"""`medley evaluate`: methods on a testbed or a manifest, scored, with intervals, as a report. The flags; the work is in
app.evaluation."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from app import engines, options
from app.cli.tables import table
from app.terminal import Terminal, err, out, printable
from composition import Refused, Request, record
from composition.bundled import BUNDLES

if TYPE_CHECKING:
    from app.evaluation.run import EvaluationConfig, Outcome

METHODS, REPORT = "merge,switch,composite", Path("evaluation")
BELOW, LEFT_OUT = 1, 3  # exit codes
WIDE = 140  # letters that the printed table has at least; a narrower terminal wraps them
SHOWN = ("presence", "all_present", "clipscore", "concept_min", "clip_i", "leakage", "evaluations", "seconds")

EPILOG = ("The prompt alone is always one of the variants. The same command goes on where it was stopped. Exit code 0: done; 1: a mean is "
          "below its --fail-below; 3: done, but something was left out (it is listed); 2: nothing was done.")  # fmt: skip


def evaluate(
    manifest: Annotated[Path | None, typer.Argument(help="JSONL with a request or a picture a line, or a folder with "
                                                    "metadata.jsonl; instead of --testbed.")] = None,
    testbed: Annotated[str | None, typer.Option(help="pocket, pocket-flux, or a *_lora_info.json file as ComposLoRA has it.")] = None,
    methods: Annotated[str | None, typer.Option(help=f"Which, as none,merge:anchored=true,cmlora:cache=false ({METHODS}; a manifest's lines "
                                                "say their own).")] = None,
    loras: Annotated[str, typer.Option(metavar="SIZES", help="Sizes of the sets, as 2,3 or 2-5.")] = "2-5",
    sets: Annotated[str, typer.Option(help="Sets of each size, drawn evenly, or all.")] = "24",
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
    steps: Annotated[int | None, typer.Option(help="Denoising steps (the model's own).")] = None,
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
        like=Request(prompt="", model=model, negative=negative, steps=steps, guidance=guidance, sampler=sampler,
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


def _config(*, methods: str | None, sizes: str, sets: str, option: Sequence[str], tune: str, scale: str, **plain: Any) -> "EvaluationConfig":
    """The flags, checked. Raises Refused before anything is opened."""
    from app.evaluation import variants
    from app.evaluation.run import EvaluationConfig
    from composition.backbones import schedulers
    from retrieval.judge import SCALES

    read = variants.read_methods(methods if methods is not None else METHODS if plain["testbed"] else "", option)
    tuned = [name for name in variants.read_methods(tune) if name in read]
    if scale not in SCALES:
        raise Refused(f"--scale {scale}: choose from {', '.join(SCALES)}")
    if not re.fullmatch(r"all|[1-9]\d{0,5}", sets.strip()):
        raise Refused(f"--sets {sets}: a number, or all")
    schedulers.named(plain["like"].sampler)
    return EvaluationConfig(
        methods=tuple(read), options=read, sizes=tuple(variants.numbers(sizes, "--loras")),
        sets=None if sets.strip() == "all" else int(sets), tune=tuple(tuned), scale=scale, **plain)  # fmt: skip


def _bar(text: str) -> tuple[str, str, float]:
    """METHOD:METRIC=VALUE or METRIC=VALUE."""
    from app.evaluation.scoring import METRICS

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
    from app.evaluation.report import shown
    from app.evaluation.scoring import METRICS

    document = outcome.document
    summary = document["metrics"]
    metrics = [metric for key in SHOWN for metric in METRICS if metric.key == key and key in summary]
    rows = table("", *(metric.title for metric in metrics), right=tuple(metric.title for metric in metrics))
    for variant in document["variants"]:
        cells = []
        for metric in metrics:
            mean = summary[metric.key]["all"]["means"].get(variant)
            cells.append("-" if mean is None else shown(mean["mean"], metric))
            if mean is not None and mean["low"] is not None and metric.key not in ("seconds", "evaluations"):
                ends = [shown(mean[end], metric).removesuffix(" %") for end in ("low", "high")]
                cells[-1] += f"\n{'..'.join(ends)}"
        rows.add_row(Text(document["titles"][variant]), *map(Text, cells))
    for column in rows.columns:
        column.no_wrap = True
    Terminal(width=max(out.width, WIDE)).print(rows)  # a narrower print would cut numbers
    for line in document["remarks"]:
        out.print(Text(printable(line), style="dim"))
    for line in document["problems"]:
        err.print(Text(printable(f"left out: {line}"), style="yellow"))
    out.print(Text(f"report: {outcome.page}"))
