"""`medley inspect`: what a LoRA file is and where it acts; of several, whether they get in each other's way."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from app import engines
from app.cli import tables
from app.overlaps import compared, line
from app.terminal import out, printable
from composition import Refused

if TYPE_CHECKING:
    from composition.loras.conflicts import Conflicts, Strength

WIDE = 40  # letters of the longest bar
MOST_BLOCKS = 24  # rows of bars
MOST_NAME = 24  # letters of a name beside bars
EPILOG = ("Strength is the length of a LoRA's updates, |dW|, at weight 1; a cosine of 1 means that two LoRAs change the same layers the same way, 0 that they do not touch each "
          "other in the weights. Both are exact, from the factors alone.")  # fmt: skip


def inspect(
    file: Annotated[list[str], typer.Argument(metavar="FILE...", help="LoRA files, or names that `medley loras` shows; of several their conflicts are shown.")],
    picture: Annotated[Path | None, typer.Option(metavar="OUT.png", help="Also draw the strength by block into a file.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Show what of the file this model applies.")] = None,
    lora_dir: Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder in which LoRAs are found by name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a LoRA file is, and how strong in each block; with --model what of it that model applies. Of several: whether they are in each other's way."""
    engines.prepare(model or "pocket")
    if picture is not None and picture.suffix.lower() != ".png":
        raise Refused(f"--picture {picture}: must end in .png")
    from composition import condition_sources
    from composition.loras import library

    folders = engines.folders(lora_dir or [])
    if len(file) == 1 and (of_condition := condition_sources.described(file[0], model or "pocket", folders)):
        control, receipt = of_condition
        out.document(tables.as_json(tables.control_row(control) | asdict(receipt))) if json else tables.control_receipt(out, control, receipt)
        return
    paths = [library.find(source, model or "pocket", folders) for source in file]
    if len(paths) == 1:
        _alone(paths[0], model, folders, picture, json)
    else:
        _together(file, paths, model, picture, json)


def _alone(path: Path, model: str | None, folders: Sequence[Path], picture: Path | None, json: bool) -> None:
    from composition.loras import library, reader

    base = model or ("pocket" if path in library.files("pocket") else "")
    if base:
        with engines.open_engine(base, engines.EngineOptions(folders=tuple(folders))) as engine:
            receipt = engine.inspect(str(path))
    else:
        receipt = reader.inspect(path)
    conflicts, _ = compared([path], base)
    (strength,) = conflicts.strengths
    _draw(picture, conflicts)
    if json:
        out.document(tables.as_json(asdict(receipt) | {"model": base, "strength": strength.length, "blocks": strength.blocks}))
        return
    tables.receipt(out, receipt, base)
    _bars([strength])


def _together(sources: Sequence[str], paths: Sequence[Path], model: str | None, picture: Path | None, json: bool) -> None:
    conflicts, receipts = compared(paths, model or "")
    _draw(picture, conflicts)
    if json:
        overlaps = [asdict(overlap) for overlap in conflicts.overlaps]
        out.document(tables.as_json({"files": [asdict(receipt) for receipt in receipts], **asdict(conflicts), "overlaps": overlaps}))
        return
    for strength, receipt in zip(conflicts.strengths, receipts, strict=True):
        kind = f", {receipt.category}" if receipt.category else ""
        out.print(Text(printable(f"{strength.name}{kind}: {receipt.family}, {receipt.layout}, strength {strength.length:.3g}"
                                 + (f"; {strength.other} layers of other kinds than LoRA are not compared" if strength.other else ""))))
    _bars(conflicts.strengths)
    for overlap in conflicts.overlaps:
        out.print(Text(printable(line(overlap))))
    out.print(Text(printable(conflicts.sentence)))
    loras = " ".join(f"--lora {source}:{weight:g}" for source, weight in zip(sources, conflicts.weights.values(), strict=True) if weight)
    out.print(Text(printable(f"to begin with: {loras} --method {conflicts.method}  ({conflicts.why})")))


def _draw(picture: Path | None, conflicts: "Conflicts") -> None:
    if picture is None:
        return
    from app.drawing.strength_plot import plot
    from composition import atomic

    sheet = plot(conflicts.strengths, conflicts.sentence)
    try:
        atomic.write(picture, lambda file: sheet.save(file, "PNG"))
    except OSError as error:
        raise Refused(f"--picture {picture} cannot be written: {error.strerror}") from None


def _bars(strengths: "Sequence[Strength]") -> None:
    """A bar for each block, for each LoRA."""
    ink = "█" if "utf" in (out.encoding or "").lower() else "#"
    blocks = _grouped(list(dict.fromkeys(block for strength in strengths for block in strength.blocks)))
    lengths = [{name: math.sqrt(sum(strength.blocks.get(block, 0.0) ** 2 for block in inside)) for name, inside in blocks.items()} for strength in strengths]
    longest = max((length for row in lengths for length in row.values()), default=0.0) or 1.0
    grid, wide = Table.grid(padding=(0, 2)), max(8, min(WIDE, out.width - 54)) if len(strengths) > 1 else WIDE
    for name in blocks:
        for strength, row in zip(strengths, lengths, strict=True):
            label = Text(printable(strength.name[:MOST_NAME] if len(strengths) > 1 else ""), style="dim")
            grid.add_row(Text(name if strength is strengths[0] else ""), label, Text(f"{ink * max(round(wide * row[name] / longest), int(row[name] > 0))} {row[name]:.3g}"))
    out.print(grid)


def _grouped(blocks: Sequence[str]) -> dict[str, list[str]]:
    """Rows of bars: each block, or as many neighbours of a kind together as leave MOST_BLOCKS rows at most."""
    size = math.ceil(len(blocks) / MOST_BLOCKS)
    rows: dict[str, list[str]] = {}
    kinds = {block: block.partition(".")[0] for block in blocks}
    for kind in dict.fromkeys(kinds.values()):
        mine = [block for block in blocks if kinds[block] == kind]
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            rows[part[0] if len(part) == 1 else f"{part[0]} to {part[-1].rpartition('.')[2]}"] = part
    return rows
