"""`medley merge`: several LoRA files added up as one, without a model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from app import engines
from app.cli import export, flags, rewritten
from app.terminal import out, printable
from composition import Refused

SUM = "sum"
EPILOG = ("The sum is what `--method merge` makes of the LoRAs in every picture: the factors of each layer side by side, so the ranks add up. Other methods measure on a "
          "model: medley merge --method ssr is medley export --method ssr, with --model.")  # fmt: skip


def merge(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    lora: Annotated[list[str] | None, typer.Option("--lora", metavar="NAME[:WEIGHT]", help="A LoRA by name or path, with its weight (1). Repeat for more.")] = None,
    to: Annotated[str | None, typer.Option(metavar="LAYOUT", help="diffusers or kohya (kohya for Stable Diffusion, else diffusers).")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of each layer at most, by its largest singular values (the sum of the ranks).")] = None,
    precision: Annotated[str | None, typer.Option(help=f"Of the file's numbers: {', '.join(rewritten.NUMBERS)} (the finest that the files have).")] = None,
    method: Annotated[str, typer.Option(help="sum, or one that `medley export` takes, on --model.")] = SUM,
    title: Annotated[str, typer.Option(help="Shown in lists (from the LoRAs).")] = "",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Whose layers the files name, where that is not the public model of their family.")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Leave out tensors that fit no layer.")] = False,
    lora_dir: Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder in which LoRAs are found by name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Add several LoRA files up, with their weights, as one file; no model is loaded (`medley export`: by a method, on a model)."""
    if method not in (SUM, "merge"):
        if to is not None:
            raise Refused(f"--to goes with the sum alone: method {method:.100} writes the layout that most tools read; medley convert makes another of it")
        export.export(context, file, lora, method=method, rank=rank, precision=precision or rewritten.NUMBERS[0], title=title, model=model,
                      allow_partial=allow_partial or None, lora_dir=lora_dir, json=json)
        return
    path, layout = rewritten.new_file(file), rewritten.layout(to)
    if not lora:
        raise Refused("which LoRAs? medley merge sum.safetensors --lora raccoon:0.8 --lora ink:0.5")
    engines.prepare(model or "pocket")
    numbers = rewritten.numbers(precision)
    from composition.conversion import merge as written
    from composition.loras import library

    folders = engines.folders(lora_dir or [])
    loras = [flags.lora(text) for text in lora]
    files = [(each, library.find(each.source, model or "pocket", folders)) for each in loras]
    result = written(files, path, to=layout, rank=rank, model=model or "", precision=numbers, title=title, allow_partial=allow_partial)
    rewritten.shown(result, json, {"title": result.metadata.get("title", "")})
    if not json:
        out.print(Text(printable(f'use it by itself, at weight 1: medley generate "..." --lora {path}')))
