"""`medley convert`: a LoRA file in another layout or with fewer ranks; a pickle, where the user says so, as safetensors."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.text import Text

from app import engines
from app.cli import rewritten, tables
from app.terminal import out, printable
from composition import Refused, atomic

EPILOG = ("No model is loaded: of the base only the names of its layers are read. What is lost is printed: nothing in another layout, the truncation with --rank. "
          "`medley merge` adds several up.")  # fmt: skip


def convert(
    file: Annotated[str, typer.Argument(metavar="IN", help="A LoRA file, or a name that `medley loras` shows.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    to: Annotated[str | None, typer.Option(metavar="LAYOUT", help="diffusers or kohya (the file's own).")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of each layer at most, by its largest singular values; the first ranks of a DyLoRA file. It makes a LoRA of a LoKr, LoHa or full difference.")] = None,
    precision: Annotated[str | None, typer.Option(help=f"Of the file's numbers: {', '.join(rewritten.NUMBERS)} (the file's own).")] = None,
    unsafe_pickle: Annotated[bool, typer.Option("--unsafe-pickle", help="IN is a pickle (.pt, .bin, .ckpt): read its tensors in a process of its own, offline and under "
                                                "limits, as weights alone. Only for files whose maker you trust.")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Whose layers the file names, where that is not the public model of its family.")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Leave out tensors that fit no layer.")] = False,
    lora_dir: Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder in which LoRAs are found by name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a LoRA file in another layout, exactly, or with fewer ranks, and say what was lost."""
    path, layout = rewritten.new_file(target), rewritten.layout(to)
    engines.prepare(model or "pocket")
    numbers = rewritten.numbers(precision)
    from composition.conversion import convert as written
    from composition.loras import library, pickles

    with TemporaryDirectory() as folder:
        if unsafe_pickle:
            content = pickles.read(Path(file))
            if layout is None and rank is None and numbers is None:
                atomic.write(path, content)
                out.document(tables.as_json({"file": str(path), "bytes": len(content)})) if json else out.print(Text(printable(
                    f"{path}  {len(content) / 1e6:.1f} MB: the tensors of {file}, by the names that they have there")))
                return
            source = Path(folder) / f"{Path(file).stem}.safetensors"
            source.write_bytes(content)
        else:
            source = library.find(file, model or "pocket", engines.folders(lora_dir or [])) if not _is_file(file) else Path(file)
            if layout is None and rank is None and numbers is None:
                raise Refused("what is to change? medley convert IN OUT.safetensors --to diffusers (or kohya), --rank N, or --precision float16")
        rewritten.shown(written(source, path, to=layout, rank=rank, model=model or "", precision=numbers, allow_partial=allow_partial), json)


def _is_file(source: str) -> bool:
    """A file of any kind by its path: one that is no LoRA is then refused for what it is."""
    try:
        return Path(source).is_file()
    except (OSError, ValueError):
        return False
