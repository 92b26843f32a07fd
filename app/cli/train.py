"""`medley train concept`: pictures and a word in, a LoRA out. The flags, checked; the work is in app.trainer."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from app import engines, settings
from app.cli.trainer import Lesson, TrainConfig, learn
from app.terminal import err, out
from composition import Refused, record
from composition.request import ALWAYS_ON, Category
from composition.training import captions

sub = typer.Typer(help="Make LoRAs of your own, and what finds them.", no_args_is_help=True)
CATEGORIES = tuple(name for name in get_args(Category) if name not in ("", ALWAYS_ON))

EPILOG = ("Captions: NAME.txt beside NAME.png, or metadata.jsonl with file_name and text. Ctrl-C keeps what was learned; "
          "the same command goes on from there.")  # fmt: skip


@sub.callback()
def _train() -> None:
    """Make LoRAs of your own, and what finds them."""


@sub.command(epilog=EPILOG)
def concept(
    images: Annotated[list[Path] | None, typer.Option(metavar="DIR", help="A folder with pictures of it; five are enough. "
                                                      "Repeat, each with a --trigger, to learn several at once.")] = None,
    trigger: Annotated[list[str] | None, typer.Option(metavar="WORD", help="The word that prompts will use for it.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="Name of the LoRA (from the trigger); once for each --images.")] = None,
    category: Annotated[list[str] | None, typer.Option(help=f"{', '.join(CATEGORIES)} (object); once, or once for each.")] = None,
    title: Annotated[list[str] | None, typer.Option(help="Title shown in lists (from the trigger); once for each.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="The base, as for generate.")] = "pocket",
    steps: Annotated[int | None, typer.Option(help="Training steps (depends on the model's size, as all below).")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank: how much it can hold.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures of each concept in a step.")] = None,
    targets: Annotated[str | None, typer.Option(help="Layers, as attention,feed_forward; also projection, convolution, "
                                                "text.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and pictures give the same LoRA.")] = 0,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Show pictures mirrored too; not for what has a left and a "
                                       "right, as writing.")] = True,
    out_dir: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Folder for the LoRA (your LoRA folder, "
                                                 "where --lora NAME finds it).")] = None,
    preview_every: Annotated[int | None, typer.Option(help="Steps between preview pictures; 0 for none.")] = None,
    preview_prompt: Annotated[list[str] | None, typer.Option(help="A prompt for the previews. Repeat for more.")] = None,
    checkpointing: Annotated[bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing: "
                                                       "less memory, a third more time.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (the best there is).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (what suits the device).")] = None,
) -> None:
    """Teach a model one or more new words from a few pictures of each, as LoRAs."""
    folder = out_dir or settings.lora_folder()
    lessons = lessons_of(images or [], trigger or [], name or [], category or [], title or [])
    check_common(dtype, seed, preview_every)
    engines.prepare(model)
    free([lesson.name for lesson in lessons], folder, model)
    config = TrainConfig(
        model=model, folder=folder, steps=steps, rank=rank, rate=rate, batch=batch, seed=seed, flip=flip, device=device,
        targets=tuple(part.strip().replace("-", "_") for part in targets.split(",")) if targets is not None else None,
        preview_every=preview_every, preview_prompts=tuple(preview_prompt or ()), checkpointing=checkpointing, dtype=dtype)  # fmt: skip
    if not learn(lessons, config, out, err):
        raise typer.Exit(130)


def lessons_of(
    images: Sequence[Path], triggers: Sequence[str], names: Sequence[str], categories: Sequence[str], titles: Sequence[str]
) -> list[Lesson]:
    """One lesson per folder. Raises Refused when the flags do not match in number, or a trigger cannot be used."""
    if not images or not triggers:
        raise Refused("a folder of pictures and a word are needed: medley train concept --images my-cat --trigger mycat")
    if len(images) != len(triggers):
        raise Refused(f"{len(images)} --images and {len(triggers)} --trigger: give each folder its word")
    for flag, values in (("--name", names), ("--title", titles)):
        if values and len(values) != len(images):
            raise Refused(f"{len(values)} {flag} for {len(images)} --images: give one for each, or none")
    if len(categories) not in (0, 1, len(images)):
        raise Refused(f"{len(categories)} --category for {len(images)} --images: give one, or one for each")
    lessons = []
    for index, (folder, word) in enumerate(zip(images, triggers, strict=True)):
        word = captions.check_trigger(word)
        kind = categories[index if len(categories) > 1 else 0] if categories else "object"
        if kind not in CATEGORIES:
            raise Refused(f"--category {kind}: choose from {', '.join(CATEGORIES)}")
        title = " ".join(titles[index].split()) if titles else word[:1].upper() + word[1:]
        lessons.append(Lesson(folder, word, checked_name(names[index]) if names else _name_from(word), kind, title))
    for what, values in (("name", [lesson.name for lesson in lessons]), ("--trigger", [lesson.trigger.lower() for lesson in lessons])):
        if len(set(values)) != len(values):
            raise Refused(f"two concepts have the same {what}: {', '.join(values)}")
    return lessons


def check_common(dtype: str | None, seed: int, preview_every: int | None) -> None:
    """Raises Refused for what no training can use."""
    if dtype not in (None, "float32", "bfloat16"):
        raise Refused(f"--dtype {dtype}: training needs float32 or bfloat16; float16 overflows in it")
    if seed < 0 or (preview_every or 0) < 0:
        raise Refused("--seed and --preview-every cannot be negative")


def free(names: Sequence[str], folder: Path, model: str) -> None:
    """Raises Refused when a LoRA of one of the names is there already."""
    from composition.loras import library

    if folder.exists() and not folder.is_dir():
        raise Refused(f"--out {folder} is not a folder")
    record.ready(folder)
    for name in names:
        file = folder / f"{name}.safetensors"
        if file.exists():
            raise Refused(f"{file} is there already and is not overwritten: choose another --name, or delete it")
        same = next((path for path in library.files(model, engines.folders(())) if path.stem == name), None)
        if same:
            raise Refused(f"a LoRA is named {name!r} already ({same}): choose another --name, so that --lora finds one")


def checked_name(name: str) -> str:
    """The name. Raises Refused for one that no file can have."""
    if not re.fullmatch(r"[^\W_][\w .+-]*", name) or name.endswith((".", " ", ".safetensors")) or len(name) > 100:
        raise Refused(f"--name {name!r}: a name is letters, digits, spaces and . + - _ (it becomes NAME.safetensors)")
    return name


def _name_from(trigger: str) -> str:
    plain = re.sub(r"[^\w.+-]+", "-", trigger.lower()).strip("-._+")
    if not plain:
        raise Refused(f"no file can be named after the trigger {trigger!r}: give a --name")
    return checked_name(plain)
