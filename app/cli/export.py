"""`medley export`: several LoRAs, as a method has them, as one LoRA file."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from app import engines, remarks
from app.cli import flags, tables
from app.cli.rewritten import NUMBERS, new_file
from app.terminal import out, printable
from app.workbench import stoppable
from composition import Refused, Request

EPILOG = ("The file is a LoRA like any other: medley generate --lora OUT.safetensors, diffusers' load_lora_weights, ComfyUI and A1111 read it. Use it by itself, "
          "at weight 1. `medley methods` says which methods can be exported.")  # fmt: skip


def export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    lora: Annotated[list[str] | None, typer.Option("--lora", metavar="NAME[:WEIGHT]", help="A LoRA by name or path, with its weight (1). Repeat for more. JSON "
                                                   "with the fields of a Lora works too.")] = None,
    method: Annotated[str | None, typer.Option(help="How the LoRAs are composed (merge): depth, lego, merge, np-lora or ssr, which are the same in every step and place of the picture.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the method. Repeat for more.")] = None,
    prompt: Annotated[str | None, typer.Option(help="For methods that measure with a prompt: what the pictures will be of (ssr asks for each LoRA by its trigger "
                                               "word unless told otherwise).")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of each layer at most (as many as the LoRAs have together): a smaller file, nearly the same.")] = None,
    precision: Annotated[str, typer.Option(help=f"Of the file's numbers: {', '.join(NUMBERS)}.")] = NUMBERS[0],
    title: Annotated[str, typer.Option(help="Shown in lists (from the LoRAs and the method).")] = "",
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base, as for generate (pocket).")] = None,
    negative: Annotated[str | None, typer.Option(help="As for generate; read where the method measures.")] = None,
    sampler: Annotated[str | None, typer.Option(help="As for generate; read where the method measures.")] = None,
    steps: Annotated[int | None, typer.Option(help="As for generate; read where the method measures.")] = None,
    guidance: Annotated[float | None, typer.Option(help="As for generate; read where the method measures.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="As for generate; read where the method measures.")] = None,
    allow_partial: Annotated[bool | None, typer.Option("--allow-partial", help="Use LoRAs of which not every tensor fits.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (the best there is).")] = None,
    dtype: Annotated[str | None, typer.Option(help="What the model computes in (what suits the device).")] = None,
    offload: Annotated[str, typer.Option("--offload", "--cpu-offload", help="auto, none, model, sequential or group.")] = "auto",
    lora_dir: Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder in which LoRAs are found by name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write several LoRAs, as a method has them on a model, as one LoRA file that any tool reads (`medley merge`: their sum, without a model)."""
    path = new_file(file)
    if precision not in NUMBERS:
        raise Refused(f"--precision {precision:.200}: choose from {', '.join(NUMBERS)}")
    if not lora:
        raise Refused("which LoRAs? medley export set.safetensors --lora raccoon:0.8 --lora ink --method ssr")
    engines.prepare(model or "pocket")
    request, _ = flags.request(context.params, Request(prompt=""))
    from composition import methods
    from composition.export import check
    from composition.export import export as written

    check(request, methods.find(request.method))  # before a model is opened
    import torch

    place = engines.EngineOptions(device, dtype, offload, engines.folders(lora_dir or []))
    with engines.open_engine(request.model, place) as engine, stoppable() as cancel:
        result = written(engine, request, path, rank=rank, dtype=getattr(torch, precision), title=title, cancel=cancel)
    document: dict[str, Any] = {
        "file": str(path), "bytes": path.stat().st_size, "layers": sum(result.ranks.values()), "ranks": result.ranks, "components": result.components, "kept": result.kept,
        "title": result.metadata["title"], "method": request.method, "notes": result.notes}  # fmt: skip
    if json:
        out.document(tables.as_json(document))
        return
    for receipt in result.receipts:
        out.print(Text(printable(receipt.line()), style="dim"))
    for line in remarks.remarks(result.notes):
        out.print(Text(printable(line), style="dim"))
    least, most = min(result.ranks), max(result.ranks)
    ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
    kept = f", {result.kept:.2%} of the updates' energy kept" if rank is not None else ""
    out.print(Text(printable(f"{path}  {document['title']}: {document['layers']} layers of {ranks}, {document['bytes'] / 1e6:.1f} MB{kept}")))
    out.print(Text(printable(f'use it by itself: medley generate "..." --lora {path}')))
