"""`medley train retriever`: a weight encoder of the user's own library. The flags; the work is in retriever_trainer."""

from pathlib import Path
from typing import Annotated

import typer

from app import engines
from app.cli.retriever_trainer import RetrieverConfig, learn
from app.terminal import out

EPILOG = "It learns from titles, trigger words, tags and descriptions, and from behaviours (`medley index --behaviour`)."


def retriever(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="DIR...", help="Folders of LoRA files, besides your own.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="The base that the LoRAs are for.")] = "pocket",
    judge: Annotated[str, typer.Option(help="The open-clip model whose texts are compared: the one your library was indexed with.")] = "pocket",
    check: Annotated[bool, typer.Option("--check/--no-check", help="First learn without a fifth of the LoRAs, and measure how well prompts find "
                                        "those; what finds no more than chance is not kept.")] = True,
) -> None:
    """Learn from your library what LoRAs do by their weights, so that a prompt finds files without any words, and no picture is drawn for it."""
    engines.prepare(model, judge=judge)
    learn(RetrieverConfig(model, tuple(engines.folders(folders or [], "")), judge, check), out)
