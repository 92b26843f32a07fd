"""What the command line prints: tables, panels and lines, for people and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from app import concepts, remarks
from app.cli.session import Tile
from app.terminal import printable
from composition import Receipt, Request, Result

if TYPE_CHECKING:
    from composition.condition_sources import Control
    from composition.loras import library
    from composition.methods import Method
    from composition.profiles.behaviour import Behaviour
    from composition.profiles.frequency import Profile


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, default=str)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return grid


def loras(console: Console, listed: Sequence["library.Listed"], folder: Path) -> None:
    """Files with what they say of themselves, or why they could not be read; and where to put more."""
    rows = table("name", "category", "trigger words", "rank", "size", "for", right=("rank", "size"))
    for path, receipt, trouble, size in listed:
        name, bytes = Text(printable(path.stem)), "" if size is None else f"{size / 1e6:.1f} MB"
        if receipt is None:
            rows.add_row(name, "", Text(printable(trouble), style="red"), "", bytes, "")
            continue
        ranks = "/".join(str(rank) for rank in sorted(receipt.ranks))
        rows.add_row(name, receipt.category, Text(printable(", ".join(receipt.triggers))), ranks, bytes, Text(printable(_base_family(receipt))))
    if listed:
        console.print(rows)
    else:
        console.print("no LoRA files found")
    console.print(Text(f"your own: put .safetensors files into {folder}, or name a folder with --lora-dir", style="dim"))


def controls(console: Console, named: Sequence["Control"]) -> None:
    """What reads pictures that control, with what their files say of those; nothing where there is none."""
    if not named:
        return
    rows = table("--control", "is", "picture", "annotator")
    for each in named:
        rows.add_row(Text(printable(each.name)), each.sort, each.kind, Text(printable(each.annotator)))
    console.print(rows)


def control_receipt(console: Console, of: "Control", read: Receipt) -> None:
    """The receipt of what reads a picture that controls, and what it wants of that picture."""
    receipt(console, read, "")
    drawn = f"drawn by annotator {of.annotator}" if of.annotator else "as it is"
    console.print(Text(printable(f"a {of.sort}: --control {of.name}=PICTURE; its picture is {of.kind}, {drawn}")))


def loras_json(listed: Sequence["library.Listed"], named: Sequence["Control"] = ()) -> str:
    """The same as JSON, with hashes where they were computed; what reads pictures that control has "control", which says what it is."""
    rows = []
    for path, receipt, trouble, size in listed:
        row: dict[str, Any] = {"name": path.stem, "path": str(path), "bytes": size, "error": trouble}
        if receipt is not None:
            row |= {"title": receipt.title, "category": receipt.category, "triggers": list(receipt.triggers), "ranks": sorted(receipt.ranks),
                    "family": receipt.family, "layout": receipt.layout, "tensors": receipt.tensors}
            row |= {"sha256": receipt.sha256, "tensor_sha256": receipt.tensor_sha256} if receipt.sha256 else {}
        rows.append(row)
    return as_json(rows + [control_row(each) for each in named])


def control_row(of: "Control") -> dict[str, Any]:
    return {"name": of.name, "path": str(of.path), "control": of.sort, "kind": of.kind, "annotator": of.annotator}


def receipt(console: Console, of: Receipt, base: str) -> None:
    """One receipt as a panel. base: the model it was read against, "" for none."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        if value not in ("", None):
            rows.add_row(name, Text(printable(str(value))))

    row("file", of.path)
    row("title", of.title)
    row("category", of.category)
    row("trigger words", ", ".join(of.triggers))
    row("made for", _base_family(of))
    row("layout", of.layout)
    row("kind", ", ".join(f"{kind} ({count} layer{'s' * (count != 1)})" for kind, count in of.kinds.items()))
    row("rank", _counted(of.ranks))
    row("alpha", _counted(of.alphas))
    row("alpha from", " and ".join(of.alpha_from))
    row("sha256", of.sha256)
    row("tensors' sha256", of.tensor_sha256)
    if base:
        row("on model", base)
        row("applied", f"{of.applied} of {of.tensors} tensors, {of.coverage:.0%}")
        for name, count in of.components.items():
            row(f"  {name}", f"{count['tensors']} tensors in {count['modules']} modules")
    else:
        row("tensors", of.tensors)
    for reason, keys in of.ignored.items() if base else ():
        row("ignored", f"{len(keys)}: {reason}, as {keys[0]}" if keys else reason)
    for remark in of.remarks:
        row("note", remark)
    if of.no_effect:
        row("no effect", f"{len(of.no_effect)} modules, as {of.no_effect[0]}")
    console.print(Panel(rows, title=Text(printable(of.name)), title_align="left", expand=False))


def _base_family(of: Receipt) -> str:
    """The family that its keys and shapes show, else the base that its trainer wrote into it."""
    return of.family if of.family != "unknown" else of.metadata.get("base", "")


def _counted(values: Mapping[Any, int]) -> str:
    """"8" when all modules agree, else "8 (60 modules), 16 (4 modules)"."""
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in sorted(values.items()))


def methods(console: Console, known: Mapping[str, "Method"]) -> None:
    """Every method with its cost, paper and options."""
    parts = []
    for method in known.values():
        parts.append(Text.assemble((method.name, "bold"), f"  {method.title}. {method.about}"))
        evaluations = "1 evaluation a step" if method.cost == "1" else f"evaluations a step, of K LoRAs: {method.cost}"
        paper = f"; https://arxiv.org/abs/{method.paper}" if method.paper else ""
        one_file = "; medley export writes it as one LoRA file" if method.static else ""
        parts.append(Text(f"    {evaluations}{paper}{one_file}", style="dim"))
        for item in fields(method.options):
            parts.append(Text(f"    --option {item.name}={_default(item)}  {item.metadata.get('help', '')}{_range(item)}"))
    console.print(Group(*parts))


def _default(item: Any) -> object:
    value = item.default if item.default is not MISSING else item.default_factory() if item.default_factory is not MISSING else ""
    return str(value).lower() if isinstance(value, bool) else value


def _range(item: Any) -> str:
    low, high = item.metadata.get("ge"), item.metadata.get("le")
    return f" ({low} to {high})" if low is not None and high is not None else ""


def result(console: Console, of: Result, drawn: bool) -> None:
    """What was applied, what the user should know, how long it took."""
    request = of.request
    if drawn:
        console.print(Text(f"seed {request.seed} (drawn; give --seed {request.seed} to make this again)"))
    for receipt in of.receipts:
        console.print(Text(printable(receipt.line())))
    for receipt in of.condition_receipts.values():
        console.print(Text(printable(receipt.line())))
    for line in remarks.controls(request):
        console.print(Text(line))
    for line in remarks.remarks(of.notes):
        console.print(Text(printable(line), style="yellow"))


def profiles(console: Console, measured: Sequence[tuple["Profile", bool]], names: Sequence[str], low: Sequence[str]) -> None:
    """Frequency profiles by falling change, which of them lead late, and which were measured now."""
    rows = table("LoRA", "change", "level", "H early", "H late", "frequency", "", right=("change", "level", "H early", "H late"))
    by_name = {profile.name: (profile, fresh) for profile, fresh in measured}
    for name in names:
        profile, fresh = by_name[name]
        early, late = (profile.high[min(len(profile.high) - 1, int(share * len(profile.high)))] for share in (0.2, 0.8))
        rows.add_row(Text(printable(name)), f"{profile.change:+.4f}", f"{profile.level:+.4f}", f"{early:.3f}", f"{late:.3f}", "low" if name in low else "high",
                     Text("measured now" if fresh else "kept", style="dim"))
    console.print(rows)
    console.print(Text("over the first 60 % of the steps and over what the base does: change, how far the LoRA moves H, the share of high "
                       "frequencies, in a tenth of the steps; level, how much higher H is with it. Sorted by change.", style="dim"))


def behaviours(console: Console, measured: Sequence[tuple["Behaviour", bool]]) -> None:
    """What each LoRA does to pictures, in words and numbers, and which were measured now."""
    from retrieval import behaviour

    rows = table("LoRA", "behaviour", "strength", "consistency", "", right=("strength", "consistency"))
    for item, fresh in measured:
        rows.add_row(Text(printable(item.name)), behaviour.words(item.relative, item.consistency), f"{item.relative:.2f}", f"{item.consistency:+.2f}",
                     Text("measured now" if fresh else "kept", style="dim"))
    console.print(rows)
    console.print(Text("strength: how far the LoRA moves a picture, where 1 is as far as another prompt would. consistency: whether it moves all "
                       "pictures the same way, 1, or each its own, 0. No trigger word was used.", style="dim"))


def tiles(console: Console, pictures: Sequence[Tile], sheet: Path) -> None:
    """A table of the ways a picture was made, and where the strip is."""
    verdicts = [_judged(tile) for tile in pictures]
    judged = ("judge",) if any(verdicts) else ()
    rows = table("picture", "seconds", "evaluations", *judged, "file", right=("seconds", "evaluations"))
    for tile, words in zip(pictures, verdicts, strict=True):
        cells = [Text(printable(words))] if judged else []
        if tile.path is None:
            rows.add_row(tile.title, "", "", *cells, Text(f"not made: {printable(tile.refused)}", style="yellow"))
        else:
            alike = " (no LoRA has a region: the same as Merge)" if tile.result and tile.result.notes.get("no regions") else ""
            rows.add_row(tile.title, f"{tile.seconds:.1f}", str(tile.evaluations), *cells, Text(tile.path.name + alike))
    console.print(rows)
    console.print(Text(f"side by side: {sheet}"))


def _judged(tile: Tile) -> str:
    """What the judge says of a picture's LoRAs: "all found", those that are not, "" where none was judged."""
    if tile.result is None:
        return ""
    verdicts = [each for each in concepts.verdicts(tile.result.request, tile.result.receipts, tile.result.images[0]) if each.lora and each.present is not None]
    lost = ", ".join(each.lora for each in verdicts if each.lost)
    return f"no {lost}" if lost else "all found" if verdicts else ""


def generated(request: Request, results: Sequence[tuple[Path, Result]], seed_drawn: bool) -> str:
    """`generate --json`: the request and, per picture, its file, seed, seconds and notes; receipts once."""
    return as_json({
        "request": json.loads(request.json()),
        "seed_drawn": seed_drawn,
        "pictures": [{"file": str(path), "seed": result.request.seed, "seconds": dict(result.seconds),
                      "notes": dict(result.notes)} for path, result in results],
        "receipts": [asdict(receipt) for receipt in results[0][1].receipts] if results else [],
        "condition_receipts": {name: asdict(receipt) for name, receipt in results[0][1].condition_receipts.items()} if results else {},
    })
