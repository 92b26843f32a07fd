"""`medley suggest`: the LoRAs that a prompt calls for, with the evidence; and what `medley generate --auto` says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from app import engines
from app.cli import tables
from app.suggestions import composed, opened
from app.terminal import Terminal, out, printable
from composition import Request

if TYPE_CHECKING:
    from app.lora_library import Library
    from retrieval.suggest import Suggestion


def suggest(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The base that the LoRAs are for.")] = "pocket",
    lora_dir: Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder of LoRAs; it is indexed when it was not yet.")] = None,
    most: Annotated[int, typer.Option(min=1, max=16, help="At most this many.")] = 3,
    judge: Annotated[str, typer.Option(help="The open-clip model whose texts are compared: the one it was indexed with.")] = "pocket",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """LoRAs for a prompt, found by what they do and what is written of them: which, why, with which trigger word and weight.

    None, when none of your library fits. Run `medley index` first, so that files without any words are found, too.
    """
    engines.prepare(model, judge=judge)
    library = opened(model, lora_dir or [], judge)
    suggestions = library.suggest(prompt, most=most)
    if json:
        out.document(tables.as_json([row(library, each) for each in suggestions]))
        return
    if not suggestions:
        out.print("none of your LoRAs fits this prompt")
        return
    rows = tables.table("LoRA", "for", "weight", "trigger word", "why", right=("weight",))
    for each in suggestions:
        rows.add_row(Text(printable(each.candidate.name)), Text(printable(each.phrase)), f"{each.weight:g}", Text(printable(each.trigger)),
                     Text(printable("; ".join(reason.text() for reason in each.reasons))))  # fmt: skip
    out.print(rows)


def search(
    query: Annotated[str, typer.Argument(help='Words, any of which may occur; phrases in "double quotes" must.')],
    model: Annotated[str, typer.Option("--model", "-m", help="The base whose bundled LoRAs are in it too.")] = "pocket",
    lora_dir: Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder of LoRAs; it is indexed when it was not yet.")] = None,
    family: Annotated[str | None, typer.Option(help="Only LoRAs for this base: sd, sdxl, sd3, flux, pocket.")] = None,
    category: Annotated[str | None, typer.Option(help="Only of this category, as character.")] = None,
    most: Annotated[int, typer.Option(min=1, max=1000, help="At most this many.")] = 10,
    judge: Annotated[str, typer.Option(help="The open-clip model that LoRAs were indexed with.")] = "pocket",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search your LoRAs by their words, and by what they do; typos and beginnings of words are understood."""
    engines.prepare(model, judge=judge)
    from retrieval.rows import Filter

    results = opened(model, lora_dir or [], judge).search(query, Filter(family=family, category=category), most)
    if json:
        out.document(tables.as_json([
            {"name": of.name, "title": of.title, "files": list(of.files), "tensor_sha256": of.id, "family": of.family, "category": of.category,
             "triggers": list(of.triggers), "licence": of.licence, "ranks": dict(hit.ranks), "scores": dict(hit.scores)} for of, hit in results]))  # fmt: skip
        return
    if not results:
        out.print("no LoRA of your library has the words in quotes" if '"' in query else "no LoRA of your library has these words")
        return
    rows = tables.table("LoRA", "file", "base", "category", "trigger words", "found by")
    for of, hit in results:
        evidence = ", ".join(f"{name} {rank}" for name, rank in sorted(hit.ranks.items(), key=lambda pair: pair[1]))
        rows.add_row(*(Text(printable(text)) for text in (of.title or of.name, of.name, of.family, of.category, ", ".join(of.triggers[:4]), evidence)))
    out.print(rows)


def row(library: "Library", suggestion: "Suggestion") -> dict[str, Any]:
    return {"lora": suggestion.candidate.name, "path": str(library.path(suggestion)), "tensor_sha256": suggestion.candidate.id, "for": suggestion.phrase,
            "score": round(suggestion.score, 3), "weight": suggestion.weight, "trigger": suggestion.trigger, "everywhere": suggestion.everywhere,
            "why": [{"evidence": reason.evidence, "words": reason.words, "score": round(reason.score, 3), "cosine": reason.cosine}
                    for reason in suggestion.reasons]}  # fmt: skip


def added(request: Request, folders: Sequence[Path], method: str | None, say: Terminal) -> Request:
    """`composed` of the library in these folders, and a line on `say` for each LoRA that was added."""
    request, suggestions = composed(request, opened(request.model, folders), method)
    for each in suggestions:
        trigger = f", trigger word {each.trigger!r} added" if each.trigger else ""
        say.print(Text(printable(f"{each.candidate.name} at {each.weight:g} for {each.phrase!r}{trigger}: {each.reasons[0].text()}"), style="dim"))
    if suggestions:
        say.print(Text(printable(f"method {request.method}, prompt: {request.prompt}"), style="dim"))
    else:
        say.print("none of your LoRAs fits this prompt", style="dim")
    return request
