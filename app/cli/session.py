"""From a request to pictures in a folder: open the engine quietly, run with a progress bar, stop on Ctrl-C."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import remarks
from app.drawing.gate_map import heat_map
from app.drawing.overlay import sheet as draw_places
from app.drawing.strip import strip
from app.workbench import Workbench
from composition import Refused, Request, Result, atomic, record

if TYPE_CHECKING:
    pass


def pictures(at: Workbench, request: Request, folder: Path, stem: str = "", *, keep_paths: bool = False) -> Iterator[tuple[Path, Result]]:
    """Every picture of the request by itself, written as soon as it is made: each one's record makes it again."""
    record.mend(folder)
    atomic.sweep(folder, shared=True)
    for index in range(request.count):
        result = at.run(request.alone(index), request.method)
        name = f"{stem}-{record.free(folder, f'{stem}-'):04d}" if stem else ""
        yield at.save(result, folder, name, keep_paths=keep_paths), result


def places(path: Path, result: Result) -> Path | None:
    """Where each concept is, drawn, beside the picture as `<its name>-masks.png`, or learned gates as `-gates.png`; None where the method has
    neither."""
    drawn = draw_places(result.images[0], result.notes)
    if drawn is not None:
        return record.publish(drawn, path.parent, f"{path.stem}-masks")
    gates = heat_map(result.notes)
    return record.publish(gates, path.parent, f"{path.stem}-gates") if gates else None


@dataclass(frozen=True)
class Tile:
    """One way of making the same picture: where it is, what came of it, or why it was not made."""

    title: str
    path: Path | None = None
    result: Result | None = None
    refused: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.result.seconds.values()) if self.result else 0.0

    @property
    def evaluations(self) -> int:
        return round(self.result.notes.get("evaluations", 0)) if self.result else 0


def compare(
    at: Workbench, request: Request, ways: Mapping[str, Mapping[str, Any]], folder: Path, prefix: str
) -> tuple[list[Tile], Path]:
    """The request's first picture from the prompt alone and by each method (name to options): tiles, and their strip.

    A method that refuses the request is left out and says why; Refused is raised when all do.
    """
    from composition import methods

    stem = f"{prefix}-{record.free(folder, f'{prefix}-'):04d}"
    alone = request.alone(0)
    first = "No LoRA" if request.conditions or request.picture else "Prompt only"  # whose picture the same conditions control, or that starts alike
    tiles = [_tile(at, replace(alone, loras=(), method="merge", options={}), first, folder, f"{stem}-prompt")]
    for name, options in ways.items():
        way = replace(alone, method=name, options=options)
        tiles.append(_tile(at, way, methods.find(name).title, folder, f"{stem}-{name}"))
    refused = [tile for tile in tiles[1:] if tile.refused]
    if len(refused) == len(ways):
        raise Refused(refused[0].refused if refused else "no method to compare")
    used = ", ".join(name if weight == 1 else f"{name} {weight:g}" for name, weight in request.weights.items())
    caption = "  ".join([request.prompt, f"[{used or 'no LoRA'}]", *remarks.controls(request), f"seed {request.seed}"])
    shown = [(tile.result.images[0], tile.title, f"{tile.seconds:.1f} s, {tile.evaluations} evaluations")
             for tile in tiles if tile.result]
    return tiles, record.publish(strip(shown, caption), folder, f"{stem}-strip")


def _tile(at: Workbench, request: Request, title: str, folder: Path, stem: str) -> Tile:
    try:
        result = at.run(request, title)
    except Refused as error:
        at.skip(request)
        return Tile(title, refused=str(error))
    return Tile(title, at.save(result, folder, stem), result)
