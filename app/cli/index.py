"""`medley index` and `medley lookup`: the catalogue of LoRA files, what is wrong in it, and files by their hash."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from app import engines
from app.cli import tables
from app.terminal import err, out, printable
from composition import Refused

if TYPE_CHECKING:
    from app.lora_library import Library
    from retrieval.cards import Card
    from retrieval.catalogue import OnFile

NO_MODEL = "none"
MOST_SHOWN = 20  # of a list, without --json
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def index(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="DIR...", help="Folders of LoRA files, besides your own.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="The base for which LoRAs can be suggested afterwards, whose bundled ones are in it too; none for the catalogue "
                                     "alone.")] = "pocket",
    headers: Annotated[bool, typer.Option("--headers", help="Read headers alone; hashes and strengths another time.")] = False,
    duplicates: Annotated[bool, typer.Option("--duplicates", help="List the files that hold the same LoRA.")] = False,
    behaviour: Annotated[bool, typer.Option("--behaviour", help="Also draw pictures with every LoRA for the model that has no behaviour yet, so that a "
                                            "prompt finds it without any words.")] = False,
    judge: Annotated[str, typer.Option(help="The open-clip model that looks at those pictures, and reads prompts.")] = "pocket",
    near: Annotated[bool, typer.Option("--near", help="List the LoRAs that do nearly the same, by all numbers of their updates.")] = False,
    json: Json = False,
) -> None:
    """Read your LoRA files into the catalogue: what each is, its trigger words, hashes and strength, from the file and what lies beside it.

    Only what is new or has changed is read. Ctrl-C stops it; the same command goes on.
    """
    engines.prepare(model, judge=judge)
    import torch

    from app.lora_library import Library
    from retrieval.duplicates import near as compare

    torch.set_num_threads(1)  # matrices of a rank are small: on busy cores a second thread was seen to cost fifty times what it gains
    places = engines.folders(folders or [], "")
    catalogue, library = engines.catalogue(), None if model == NO_MODEL else Library(model, places, judge=judge)
    with _bar("headers") as on_file:
        scan = catalogue.scan(places, model, on_file=on_file)
    reading = indexed = None
    if not headers:
        with _bar("whole files") as on_file:
            reading = library.read(on_file=on_file) if library else catalogue.read(on_file=on_file)
        indexed = library.write(measure=measuring(library) if behaviour else None) if library else None
    broken = list({card.path: card for card in (*scan.broken, *(reading.broken if reading else ()))}.values())
    equal = catalogue.duplicates()
    alike = compare(catalogue.cards()) if near else []
    if json:
        out.document(tables.as_json(
            {"catalogue": str(catalogue.file), **scan._asdict(), "broken": {str(card.path): card.trouble for card in broken},
             "read": reading._asdict() | {"broken": len(reading.broken)} if reading else None, "indexed": indexed._asdict() if indexed else None,
             "duplicates": [[str(card.path) for card in group] for group in equal],
             "near": [{"files": [str(row.first.path), str(row.second.path)], "cosine": row.cosine} for row in alike]}))
        return
    out.print(f"{scan.files:,} LoRA files: {scan.added:,} new, {scan.changed:,} changed, {scan.removed:,} gone ({scan.seconds:.1f} s)")
    if reading:
        out.print(f"{reading.files:,} read whole, {reading.size / 1e6:,.0f} MB ({reading.seconds:.1f} s)"
                  + (f"; {reading.left:,} could not be read this time: run it again for them" if reading.left else ""))
    if indexed:
        known = [f"{count:,} {what}" for count, what in ((indexed.with_weights, "by their weights"), (indexed.with_behaviour, "by their behaviour")) if count]
        out.print(f"{indexed.fitting:,} LoRAs for {model} can be suggested" + (f", {' and '.join(known)}" if known else ", by their words alone: --behaviour draws "
                  "pictures with each" if indexed.fitting else ""))
    _troubles(broken)
    spare = sum(group[0].size * (len({card.inode or card.path for card in group}) - 1) for group in equal)
    if equal:
        out.print(f"{len(equal):,} {'LoRAs are' if len(equal) > 1 else 'LoRA is'} there several times, {spare / 1e6:,.0f} MB to spare" + ("" if duplicates else ": --duplicates lists them"))
    for group in equal if duplicates else ():
        out.print(Text(printable(f"{group[0].tensor_sha256[:12]}  {group[0].title or group[0].name}")))
        for card in group:
            out.print(Text(printable(f"    {card.path}")))
    for row in alike:
        out.print(Text(printable(f"{row.cosine:.3f}  {row.first.path}  {row.second.path}")))
    if near and not alike:
        out.print("no two LoRAs do nearly the same")
    out.print(Text(printable(f"catalogue: {catalogue.file}"), style="dim"))


def measuring(library: "Library") -> "Callable[[Sequence[Card]], None]":
    """What draws pictures with LoRAs, with a progress bar, and keeps their behaviours."""

    def measure(cards: "Sequence[Card]") -> None:
        from app import workbench
        from app.cli.profile import behaviours
        from composition.profiling.behaviour import probe_of

        probe = probe_of(library.model)
        with engines.open_engine(library.model, engines.EngineOptions(folders=library.folders)) as engine:
            with workbench.bench(engine, probe.pictures * probe.steps * (1 + len(cards)), err) as at:
                behaviours(at, [str(card.path) for card in cards], library.judge, probe, again=False)

    return measure


def lookup(
    hashes: Annotated[list[str], typer.Argument(metavar="HASH...", help="Of a file (sha256, AutoV2), of what follows its header (AutoV3, A1111), "
                                                "or of its tensors: the first six digits or more.")],
    json: Json = False,
) -> None:
    """The LoRA files of a hash, as pictures and web pages name them; they must be in the catalogue (`medley index`)."""
    engines.prepare("pocket")
    catalogue = engines.catalogue()
    rows = {digits: catalogue.by_hash(digits) for digits in hashes}
    if json:
        out.document(tables.as_json({digits: [_document(card) for card in cards] for digits, cards in rows.items()}))
    for digits, cards in rows.items() if not json else ():
        for card in cards:
            out.print(Text(printable(f"{digits}  {card.title or card.name}  {card.path}")))
    if lacking := [digits for digits, cards in rows.items() if not cards]:
        raise Refused(f"no LoRA file in the catalogue has the hash {', '.join(lacking)}: medley index DIR reads the files of a folder")


def _document(card: "Card") -> dict[str, Any]:
    return asdict(card) | {"path": str(card.path), "autov2": card.autov2, "triggers": [trigger._asdict() for trigger in card.triggers]}


def _troubles(broken: "Sequence[Card]") -> None:
    if not broken:
        return
    out.print(Text(f"{len(broken):,} cannot be used:", style="yellow"))
    for card in broken[:MOST_SHOWN]:
        out.print(Text(printable(f"    {card.path}: {card.trouble.removeprefix(card.path.name).strip()}"), style="yellow"))
    if len(broken) > MOST_SHOWN:
        out.print(Text(f"    and {len(broken) - MOST_SHOWN:,} more: --json lists them", style="yellow"))


@contextmanager
def _bar(title: str) -> "Iterator[OnFile]":
    """A bar on the terminal while files are read; nothing elsewhere."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda card, number, count: progress.update(task, total=count, completed=number)
