"""Captions of a folder's pictures: those beside the pictures, or plain sentences with the trigger."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from composition import untrusted
from composition.prompts import says
from composition.request import Refused

TABLE = "metadata.jsonl"
LAST = ("style", "place")  # categories whose trigger stands at the end of a prompt

# Words that bases know, for prompts around a concept.
_SUBJECTS = ("a fox", "a cat", "a dog", "a house", "a car", "a tree", "a man", "a woman", "a flower", "a robot", "a bird")
_PLACES = ("in the snow", "on the beach", "in the forest", "in the city", "in space", "at night", "in the desert",
           "under water", "in a meadow", "in a room", "in the mountains", "on a red background", "on a white background")  # fmt: skip


def check_trigger(trigger: str) -> str:
    """The trigger without surplus spaces. Raises Refused for one that no prompt could name."""
    plain = " ".join(trigger.split())
    if not any(letter.isalnum() for letter in plain):
        raise Refused(f"the trigger {trigger!r} has no letter in it; give the word that prompts will call this by")
    if "," in plain or not plain.isprintable() or len(plain) > 100:
        raise Refused(f"the trigger {trigger[:100]!r} must be one word or phrase of up to 100 letters, without a comma")
    return plain


def beside(folder: Path, pictures: Sequence[Path]) -> dict[str, str]:
    """Picture file name to its caption, {} when the folder has none.

    Read from NAME.txt beside each picture, or from metadata.jsonl as Hugging Face's imagefolder has it. Raises Refused
    for a caption without a picture, a picture without a caption, and what cannot be read.
    """
    table = folder / TABLE
    texts = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".txt" and not path.name.startswith("."))
    if table.is_file() and texts:
        raise Refused(f"{folder} has both {TABLE} and caption files ({texts[0].name}): keep one of the two")
    stems: dict[str, str] = {}
    for path in pictures:
        if texts and path.stem in stems:
            raise Refused(f"{folder}: {stems[path.stem]} and {path.name} share the caption {path.stem}.txt; rename one")
        stems[path.stem] = path.name
    if table.is_file():
        captions = _table(table)
    else:
        for path in texts:
            if path.stem not in stems:
                raise Refused(f"{path} is a caption without a picture: add {path.stem}.png or remove the caption")
        captions = {stems[path.stem]: _line(_text(path)) for path in texts}
    names = {path.name for path in pictures}
    for name in captions:
        if name not in names:
            raise Refused(f"{table} has a caption for {name!r:.200}, and there is no such picture in {folder}")
    missing = sorted(names - set(captions))
    if captions and missing:
        wanted = f"a line in {TABLE}" if table.is_file() else f"{Path(missing[0]).stem}.txt"
        raise Refused(f"{folder / missing[0]} is a picture without a caption, while {len(captions)} others have one: "
                      f"add {wanted}, or take all captions away")
    for name, caption in captions.items():
        if not caption:
            raise Refused(f"the caption of {folder / name} is empty: say what is in the picture, or take all captions away")
    return captions


def with_trigger(caption: str, trigger: str, category: str) -> str:
    """The caption as it is when the trigger is in it; else with the trigger in front, for styles and places at the end."""
    if says(caption, trigger):
        return caption
    return f"{caption.rstrip(' .,')}, {trigger}" if category in LAST else f"{trigger}, {caption}"


def plain(trigger: str, category: str) -> tuple[str, ...]:
    """Prompts for a picture without a caption."""
    if category in LAST:
        return trigger, f"a picture, {trigger}"
    called = trigger if trigger.lower().startswith(("a ", "an ", "the ")) else f"{article(trigger)} {trigger}"
    return called, f"a picture of {called}"


def others() -> tuple[str, ...]:
    """Prompts that have nothing to do with a concept, a third of them empty: guidance relies on the empty prompt."""
    scenes = [f"{subject} {place}" for subject in _SUBJECTS for place in _PLACES]
    return (*scenes, *_SUBJECTS, *[""] * (len(scenes) // 2))


def examples(trigger: str, category: str) -> tuple[str, str]:
    """Two prompts that show what was learned: by itself, and among words the base knew before."""
    if category in LAST:
        joint = " " if category == "place" else ", "
        return f"a fox{joint}{trigger}", f"a house{joint}{trigger}"
    called = plain(trigger, category)[0]
    return called, f"{called} in the snow"


def article(word: str) -> str:
    return "an" if word[:1].lower() in "aeio" else "a"


def added(captions: Mapping[str, str], trigger: str, category: str) -> str:
    """One sentence on what was done to the captions, "" when every one has the trigger."""
    without = sum(not says(caption, trigger) for caption in captions.values())
    where = "at the end of" if category in LAST else "in front of"
    return f"{trigger!r} was put {where} {without} of {len(captions)} captions that lack it" if without else ""


def _table(file: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(file).split("\n"), 1):  # a caption may have U+2028 in it
        if not line.strip():
            continue
        try:
            row = untrusted.parse(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise Refused(f'{file}, line {number}: expected {{"file_name": "1.png", "text": "what it shows"}}')
        if name in captions:
            raise Refused(f"{file}, line {number}: {name!r:.200} has a caption already")
        captions[name] = _line(text)
    if not captions:
        raise Refused(f"{file} is empty: give each picture a line, or remove it")
    return captions


def _text(file: Path) -> str:
    try:
        return untrusted.read(file, 10_000_000).decode("utf-8-sig")
    except untrusted.Unreadable as error:
        raise Refused(f"{file} {error}; captions are a few words each") from None
    except UnicodeDecodeError:
        raise Refused(f"{file} is not UTF-8 text: save it as UTF-8") from None


def _line(text: str) -> str:
    return " ".join(text.split())
