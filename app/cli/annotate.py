"""`medley annotate`: what an annotator makes of a picture, to look at and to use."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from app.options import size as read_size
from app.terminal import out, printable
from composition import annotators, pictures, record
from composition.annotators import ANNOTATORS

EPILOG = "\n\n".join(
    ["Annotators:", *(f"{name}: {of.about}{f' ({of.extra})' if of.extra else ''}" for name, of in ANNOTATORS.items()),
     "A condition LoRA names the one that it was trained with; --control uses that."])


def annotate(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG, JPEG, WebP or BMP file.")],
    name: Annotated[list[str], typer.Option("--with", metavar="ANNOTATOR", help=f"{', '.join(ANNOTATORS)}. Repeat for more.")],
    mask: Annotated[Path | None, typer.Option(metavar="MASK", help="For hole: a picture, white where the hole is (what is transparent).")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Of the picture to be controlled: a larger one is made smaller first, as --control "
                                             "does.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", "--output", "-o", help="Folder for the pictures.")] = Path("pictures"),
) -> None:
    """See what an annotator makes of a picture: edges, scribble, greys, blur. Its longer side becomes 1024 pixels at most."""
    record.ready(out_dir)
    for each in name:
        annotators.find(each)
    source = pictures.condition(str(picture))
    if mask is not None:
        source = pictures.with_hole(source, pictures.opaque(pictures.condition(str(mask))))
    drawn = [(each, annotators.annotate(each, source, read_size(size) if size else None)) for each in name]  # all, before any is written
    for each, image in drawn:
        stem = f"{picture.stem}-{each}"
        path = record.publish(image, out_dir, f"{stem}-{record.free(out_dir, f'{stem}-'):04d}")
        out.print(Text(printable(f"{path}  {each}: {ANNOTATORS[each].about}")))
