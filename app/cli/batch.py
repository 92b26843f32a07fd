"""`medley batch`: the pictures of a manifest, one request a line. The flags and the words; the work is in composition.batch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from app import engines, workbench
from app.cli.tables import as_json
from app.errors import sentence
from app.terminal import err, out, printable
from composition import Refused, manifest, record
from composition.batch import PICTURES, Item

FAILED = 3  # exit code
EPILOG = ("A picture is named by all that it depends on: what is there is not made again, and the same command goes on where it was "
          "stopped and tries again what failed. Exit code 0: all pictures are there; 3: some lines failed (they are listed); 2: nothing "
          "was done.")  # fmt: skip


def batch(
    lines: Annotated[Path, typer.Argument(metavar="MANIFEST.jsonl", help="One request a line, as {\"prompt\": \"a fox\", \"seed\": 1, "
                                          "\"loras\": [{\"source\": \"fox\"}]}; a manifest of an evaluation, or metadata.jsonl of a folder "
                                          "of pictures, too.")],
    out_dir: Annotated[Path, typer.Option("--out", "--output", "-o", help="Folder for the pictures and the log.")] = Path("batch"),
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many lines, from the first.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base of the lines that name none (pocket).")] = None,
    lora_dir: Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder in which LoRAs are found by name.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (the best there is).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16 (what suits the device).")] = None,
    offload: Annotated[str, typer.Option("--offload", "--cpu-offload", help="auto, none, model, sequential or group.")] = "auto",
    quantize: Annotated[str | None, typer.Option("--quantize", "--quantise", metavar="KIND", help="nf4, 8bit, int8 or fp8, as for "
                                                 "generate.")] = None,
    denoiser: Annotated[str | None, typer.Option(metavar="FILE", help="A file of the transformer alone, in place of the model's own.")] = None,
    vae: Annotated[str | None, typer.Option(metavar="FOLDER|FILE|HUB ID", help="Another VAE, for the lines that name none (\"vae\").")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Make many pictures, one request a line, into one folder; stop at any time and go on later."""
    record.ready(out_dir)
    chosen = manifest.read(lines, model or "pocket")[:limit]
    place = engines.EngineOptions(device, dtype, offload, engines.folders(lora_dir or []), quantize, denoiser, vae)
    items = _generate(chosen, out_dir, place)
    failed = [line for line in chosen if line.error or any(item.error for item in items[line.number])]
    if json:
        out.document(as_json(_summary(chosen, items, out_dir)))
    else:
        pictures = [item for line in chosen for item in items[line.number] if item.path]
        fresh = sum(item.fresh for item in pictures)
        out.print(Text(f"{len({item.id for item in pictures})} pictures in {out_dir / PICTURES}: {fresh} made now"))
        if failed:
            out.print(Text(f"{len(failed)} of {len(chosen)} lines failed; the same command tries them again"))
    if failed:
        raise typer.Exit(FAILED)


def _generate(lines: Sequence[manifest.Line], folder: Path, place: engines.EngineOptions) -> dict[int, list[Item]]:
    """The number of each line to its pictures, or to their errors; models are opened one after the other."""
    items: dict[int, list[Item]] = {line.number: [] for line in lines}
    for line in lines:
        if line.error:
            _complain(line.number, line.error)
    models = list(dict.fromkeys((line.request.model, line.request.vae) for line in lines if line.request))
    for model, vae in sorted(models, key=lambda names: Path(names[0]).exists() or "/" not in names[0]):  # of the hub first: later it may be closed
        mine = [(line.number, line.request) for line in lines if line.request and (line.request.model, line.request.vae) == (model, vae)]
        requests = [request for _, request in mine]
        try:
            with engines.open_engine(model, replace(place, vae=vae or place.vae)) as engine:
                title = model if len(models) > 1 else "making"
                for item in workbench.run_batch(engine, requests, folder, title, err, [Path(place.denoiser).expanduser()] if place.denoiser else []):
                    number = mine[item.index][0]
                    items[number].append(item)
                    if item.error:
                        _complain(number, item.error)
        except Refused as error:
            if len(models) == 1:
                raise
            for index, (number, request) in enumerate(mine):  # a model that cannot be opened is the trouble of its own lines
                items[number] = [Item(index, request, error=sentence(error))]
                _complain(number, sentence(error))
    return items


def _complain(number: int, error: str) -> None:
    err.print(Text(printable(f"line {number}: {error}"), style="yellow"))


def _summary(lines: Sequence[manifest.Line], items: dict[int, list[Item]], folder: Path) -> dict[str, Any]:
    """`batch --json`: how many there are, and for each line its pictures or its error."""
    rows = [{"line": line.number, "file": None, "error": line.error} for line in lines if line.error]
    for line in lines:
        for item in items[line.number]:
            rows.append({"line": line.number, "file": str(item.path) if item.path else None, "id": item.id, "seed": item.request.seed,
                         "seconds": item.seconds, "evaluations": item.evaluations, "made_now": item.fresh, "order": item.order,
                         "error": item.error})  # fmt: skip
    rows.sort(key=lambda row: row["line"])
    return {"folder": str(folder), "pictures": len({row["file"] for row in rows if row["file"]}),
            "made_now": sum(bool(row.get("made_now")) for row in rows), "failed": sum(bool(row["error"]) for row in rows), "rows": rows}
