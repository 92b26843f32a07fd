"""What LoRAs do to each other's layers, read from their files, and a pair of them in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composition import Receipt
    from composition.loras.conflicts import Conflicts, Overlap


def compared(paths: Sequence[Path], model: str) -> "tuple[Conflicts, list[Receipt]]":
    """The report on the LoRAs in these files, and the receipt of each. model: that they are for, "" for none. Raises Refused."""
    from composition.fitting import opened
    from composition.loras import conflicts

    files = opened(paths, model)
    names: list[str] = []
    for path in paths:
        names.append(path.stem if path.stem not in names else f"{path.stem}#{len(names) + 1}")
    return conflicts.report(dict(zip(names, files, strict=True))), [file.receipt for file in files]


def line(overlap: "Overlap") -> str:
    """A pair in one line."""
    both = f"{overlap.first} and {overlap.second}"
    if not overlap.shared:
        return f"{both}: no layer is changed by both"
    layer, cosine = max(overlap.by_layer.items(), key=lambda row: abs(row[1]))
    return (f"{both}: cosine {overlap.cosine:+.3f} over {overlap.shared} of {overlap.layers} layers, {overlap.alike} the same way, {overlap.against} against; strength "
            f"{overlap.ratio:.2g} : 1; furthest from 0 {cosine:+.2f} in {layer}")
