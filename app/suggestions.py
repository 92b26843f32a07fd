"""The request that is made of a prompt and the LoRAs which the user's library suggests for it: what `medley generate --auto` runs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from app import engines
from composition import Lora, Request, prompt_syntax

if TYPE_CHECKING:
    from app.lora_library import Library
    from retrieval.suggest import Suggestion

EVERYWHERE = "style"  # the category of what serves the whole picture and says nothing of itself
APART, PLAIN = "clora-fast", "merge"  # the methods for LoRAs that have places of their own, and for the rest


def opened(model: str, folders: Sequence[Path], judge: str = "pocket") -> "Library":
    """The library of these folders, the user's own and the model's, indexed when nothing of it was."""
    from app.lora_library import Library

    library = Library(model, engines.folders(list(folders)), judge=judge)
    library.refresh()
    return library


def composed(
    request: Request, library: "Library", method: str | None, *, most: int | None = None
) -> tuple[Request, list["Suggestion"]]:  # fmt: skip
    """The request with the LoRAs that its prompt calls for, besides those it has, and what was suggested.

    Each is bound to the words that it serves, or everywhere. A missing trigger word is added to the prompt. method: the user's choice; None:
    one that keeps things apart, where there are several LoRAs and one has a place. most: so many suggestions at most (None: as
    many as retrieval has for any prompt).
    """
    from retrieval.suggest import MOST

    present = {Path(lora.source).stem for lora in request.loras}
    suggestions = [each for each in library.suggest(prompt_syntax.words(request), most=most or MOST) if each.candidate.name not in present]
    placed = [each for each in suggestions if not each.everywhere]
    chosen = method or (APART if len(request.loras) + len(suggestions) > 1 and placed else PLAIN)
    loras, words = list(request.loras), []
    for each in sorted(suggestions, key=lambda each: prompt_syntax.words(request).lower().find(each.phrase.lower())):
        if each.trigger:
            words.append(prompt_syntax.verbatim(request, each.trigger))
        binds = None if each.everywhere or chosen == PLAIN else each.trigger or each.phrase
        loras.append(Lora(str(library.path(each)), weight=each.weight, binds=binds, category=EVERYWHERE if each.everywhere and not each.candidate.category else ""))
    return replace(request, prompt=", ".join([request.prompt, *words]), loras=loras, method=chosen), suggestions
