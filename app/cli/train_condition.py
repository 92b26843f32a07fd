"""`medley train condition`: pictures with their conditions in, a condition LoRA out. The flags, checked; the work is in condition_trainer."""

import re
from pathlib import Path
from typing import Annotated

import typer

from app import engines, settings
from app.cli import train
from app.cli.condition_trainer import ConditionConfig, learn
from app.terminal import err, out
from composition import Refused, annotators

EPILOG = ("Captions: NAME.txt beside NAME.png, or metadata.jsonl with file_name and text; without, the prompt is empty. Ctrl-C keeps what was "
          "learned; the same command goes on from there.")  # fmt: skip
SIDE = re.compile(r"[0-9]{1,5}")


def condition(
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder with pictures as they should come out.")] = None,
    annotator: Annotated[str, typer.Option(help=f"What makes each picture's condition: {', '.join(annotators.ANNOTATORS)}.")] = "",
    conditions: Annotated[Path | None, typer.Option(metavar="DIR", help="Instead, a folder with the condition of each, by the same name.")] = None,
    name: Annotated[str, typer.Option(help="Name of the condition LoRA (from the annotator).")] = "",
    kind: Annotated[str, typer.Option(help="spatial (it lies over the picture) or subject (it shows what is to appear).")] = "spatial",
    title: Annotated[str, typer.Option(help="Title shown in lists (from the name).")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="The base, a FLUX, as for generate.")] = "pocket-flux",
    size: Annotated[int | None, typer.Option(help="Side of the condition in pixels, one for all (depends on the model, as all below).")] = None,
    sides: Annotated[str | None, typer.Option(help="Sizes of the pictures, as 384,512,640: each keeps its shape at about that side squared.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank: how much it can hold.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures in a step.")] = None,
    bias: Annotated[float | None, typer.Option(help="Logit added to the condition's tokens: below 0 it is hardly seen at first.")] = None,
    drop: Annotated[float, typer.Option(help="Share of blank conditions, which leave the base as it is.")] = 0.1,
    seed: Annotated[int, typer.Option(help="The same seed and pictures give the same LoRA.")] = 0,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Show pairs mirrored too; not for what has a left and a right.")] = True,
    out_dir: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Folder for the LoRA (your LoRA folder).")] = None,
    preview_every: Annotated[int | None, typer.Option(help="Steps between preview pictures; 0 for none.")] = None,
    checkpointing: Annotated[bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing: "
                                                       "less memory, a third more time.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (the best there is).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (what suits the device).")] = None,
) -> None:
    """Teach a FLUX to follow a kind of picture (edges, colours, a subject) from pairs, as a condition LoRA."""
    folder = out_dir or settings.lora_folder()
    if images is None:
        raise Refused("a folder of pictures is needed: medley train condition --images photos --annotator canny")
    if kind not in ("spatial", "subject"):
        raise Refused(f"--kind {kind}: choose spatial or subject")
    if annotator:
        annotators.find(annotator)
    train.check_common(dtype, seed, preview_every)
    if sides is not None and not all(SIDE.fullmatch(side.strip()) for side in sides.split(",")):
        raise Refused(f"--sides {sides!r}: give sizes in pixels, as 384,512,640")
    called = train.checked_name(name or annotator or (conditions.name if conditions else ""))
    engines.prepare(model)
    train.free([called], folder, model)
    config = ConditionConfig(
        images=images, annotator=annotator, drawn=conditions, name=called, kind=kind, title=" ".join(title.split()) or called[:1].upper() + called[1:],
        model=model, folder=folder, size=size, sides=tuple(int(side) for side in sides.split(",")) if sides else None, steps=steps, rank=rank,
        rate=rate, batch=batch, bias=bias, drop=drop, seed=seed, flip=flip, preview_every=preview_every, checkpointing=checkpointing,
        device=device, dtype=dtype)  # fmt: skip
    if not learn(config, out, err):
        raise typer.Exit(130)
