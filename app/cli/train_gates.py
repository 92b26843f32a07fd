"""`medley train gates`: LoRAs in, AutoLoRA's gates out. The flags, checked; the work is in gate_trainer."""

from pathlib import Path
from typing import Annotated

import typer

from app import engines, settings
from app.cli import train
from app.cli.gate_trainer import GateConfig, learn
from app.terminal import err, out
from composition import Refused

EPILOG = ("It draws the pictures it learns from: each LoRA alone, and pairs. Ctrl-C keeps what was learned; the same command goes on from there. "
          "Then: medley generate --method autolora --option gates=FILE.")  # fmt: skip
KINDS = ("layer", "rank", "element")


def gates(
    loras: Annotated[list[str] | None, typer.Argument(metavar="LORA...", help="LoRAs to learn from, by name or file (all that are bundled with the "
                                                      "model or in your folder).")] = None,
    name: Annotated[str, typer.Option(help="Name of the file of gates.")] = "gates",
    kind: Annotated[str, typer.Option(help=f"{', '.join(KINDS)}: a number for each layer and category, gates by place from how LoRAs act there, or "
                                      "AutoLoRA's own, element by element.")] = "rank",
    film: Annotated[bool, typer.Option("--time/--no-time", help="Let gates of kind rank follow the time of the step.")] = True,
    shared: Annotated[bool, typer.Option("--global/--no-global", help="Give gates of kind element the global LoRA, too.")] = False,
    model: Annotated[str, typer.Option("--model", "-m", help="The base that the LoRAs are for.")] = "pocket",
    pictures: Annotated[int, typer.Option(help="Pictures of each LoRA and of each pair.", min=1, max=1000)] = 8,
    pairs: Annotated[int, typer.Option(help="Pairs of LoRAs that are drawn together.", min=0, max=10_000)] = 40,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1, max=1_000_000)] = 1000,
    rows: Annotated[int, typer.Option(help="Pictures in a step.", min=1, max=256)] = 4,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-2,
    apart: Annotated[float, typer.Option(help="Weight of the second term: a prompt for other LoRAs must not fit.")] = 0.5,
    seed: Annotated[int, typer.Option(help="The same seed and LoRAs give the same gates.")] = 0,
    out_dir: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Folder for the file (your LoRA folder).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (the best there is).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (what suits the device).")] = None,
) -> None:
    """Learn, for a base, how LoRAs that are added up share its layers: the gates of the method autolora, for any LoRAs of that base."""
    if kind not in KINDS:
        raise Refused(f"--kind {kind}: choose {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    train.check_common(dtype, seed, None)
    called = train.checked_name(name)
    folder = out_dir or settings.lora_folder()
    engines.prepare(model)
    train.free([called], folder, model)
    config = GateConfig(called, tuple(loras or ()), model, folder, kind, film, shared, pictures, pairs, steps, rows, rate, apart, seed, device, dtype)
    if not learn(config, out, err):
        raise typer.Exit(130)
