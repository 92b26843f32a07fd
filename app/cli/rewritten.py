"""What the commands that write a LoRA file share: where it may be written, and what is said of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from app.cli import tables
from app.terminal import out, printable
from composition import Refused, record

if TYPE_CHECKING:
    import torch

    from composition.conversion import Layout, Rewritten

NUMBERS = ("float16", "bfloat16", "float32")
LAYOUTS = ("diffusers", "kohya")


def new_file(file: Path) -> Path:
    """The file with its ending. Raises Refused for another ending, for one that is there already, and for a folder that cannot be written."""
    path = file if file.suffix else file.with_name(f"{file.name}.safetensors")
    if path.suffix.lower() != ".safetensors":
        raise Refused(f"{file} must end in .safetensors: LoRA files of any other kind are not written")
    if path.exists():
        raise Refused(f"{path} is there already and is not overwritten: choose another name, or delete it")
    try:
        record.ready(path.parent)
    except Refused as error:
        raise Refused(str(error).removeprefix("--out ")) from None
    return path


def layout(name: str | None) -> "Layout | None":
    if name is not None and name not in LAYOUTS:
        raise Refused(f"--to {name:.200}: choose from {', '.join(LAYOUTS)}")
    return "kohya" if name == "kohya" else "diffusers" if name else None


def numbers(name: str | None) -> "torch.dtype | None":
    import torch

    if name is not None and name not in NUMBERS:
        raise Refused(f"--precision {name:.200}: choose from {', '.join(NUMBERS)}")
    return getattr(torch, name) if name else None


def document(result: "Rewritten") -> dict[str, Any]:
    return {"file": str(result.file), "bytes": result.file.stat().st_size, "layout": result.layout, "layers": sum(result.ranks.values()), "ranks": result.ranks,
            "components": result.components, "exact": result.exact, "error": result.error, "worst": {"layer": result.worst[0], "error": result.worst[1]},
            "cut": result.cut}


def shown(result: "Rewritten", json: bool, more: Mapping[str, Any] | None = None) -> None:
    """Print what was written and what was lost."""
    if json:
        out.document(tables.as_json(document(result) | dict(more or {})))
        return
    for receipt in result.receipts:
        out.print(Text(printable(receipt.line()), style="dim"))
    least, most = min(result.ranks), max(result.ranks)
    ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
    out.print(Text(printable(f"{result.file}  {result.layout}: {sum(result.ranks.values())} layers of {ranks}, {result.file.stat().st_size / 1e6:.1f} MB")))
    out.print(Text(printable(result.line())))
