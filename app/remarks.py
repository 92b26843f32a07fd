"""A picture's notes as sentences and lines for the user, on the command line and the page alike."""

from collections.abc import Mapping
from typing import Any

from app.terminal import printable
from composition import Condition, Request, named, pictures, prompt_syntax, windows
from composition.request import ALWAYS_NOTE, FITTED_NOTE, HIRES_NOTE, STARTED_NOTE, UNNAMED_NOTE


def remarks(notes: Mapping[str, Any]) -> list[str]:
    """The notes that ask for the user's attention, as sentences."""
    lines = [str(notes["order"])] if notes.get("order") else []
    tagged = notes.get(prompt_syntax.TAGGED)
    if isinstance(tagged, Mapping):
        lines += [f"LoRA {name} (weight {weight:g}) is taken from its tag in the prompt" for name, weight in tagged.items()]
    if fitted := notes.get(FITTED_NOTE):
        lines.append(str(fitted))
    if isinstance(began := notes.get(STARTED_NOTE), Mapping):
        lines.append(f"started from {began.get('file') or 'a picture'} at strength {began.get('strength'):g}: {began.get('steps')} of {began.get('of')} steps ran"
                     + (f"; {began['kept']:.0%} of it is kept to the bit" if "kept" in began else ""))
    if isinstance(larger := notes.get(HIRES_NOTE), Mapping):
        lines.append(f"hires pass at {larger.get('size')}, strength {larger.get('strength'):g}: {larger.get('steps')} of {larger.get('of')} steps ran")
    if pieces := notes.get(prompt_syntax.UNREAD):
        lines.append(prompt_syntax.sentence(pieces))
    missing = notes.get("missing triggers")
    if isinstance(missing, Mapping):
        lines += [f"the prompt has none of {name}'s trigger words ({', '.join(words)}); --triggers adds one, --named-only leaves the LoRA out"
                  for name, words in missing.items()]
    if cut := notes.get("prompt cut"):
        lines.append(f"the model does not see the end of the prompt: {cut!r}")
    if names := notes.get(UNNAMED_NOTE):
        lines.append(f"no prompt says {', '.join(map(str, names))}, so the textual inversion is not read: write that word, or another with --embedding FILE:WORD")
    if why := notes.get("negative prompt not read"):
        lines.append(f"the negative prompt was not read: {why}")
    if why := notes.get("not anchored"):
        lines.append(f"anchored guidance has no negative row to act on: {why}")
    if isinstance(note := notes.get(windows.NOTE), Mapping):
        lines += [f"{name} is on in all steps: {part}" if isinstance(part, str) else f"{name} is on from {part[0]:.0%} to {part[1]:.0%} of the steps, by its category"
                  for name, part in note.items()]
    if names := notes.get(named.NOTE):
        lines.append(f"left out, as none of their trigger words is in the prompt: {', '.join(map(str, names))}")
    if names := notes.get(ALWAYS_NOTE):
        lines.append(f"always on, whatever the method does with the others: {', '.join(map(str, names))} (another category changes that, as in "
                     '--lora \'{"source": "lcm", "category": "other"}\')')
    if how := notes.get("fold"):
        lines.append(f"the LoRAs were {how}")
    if notes.get("conditions isolated"):
        lines.append("which LoRAs are on varies while this picture is made, so its conditions are read without them")
    if names := notes.get("acts everywhere in part"):
        lines.append(f"{', '.join(map(str, names))}: layers without a place (time embeddings) act on the whole picture")
    if notes.get("no regions"):
        lines.append("no LoRA has a region, so method regions is the same as merge: give them as in "
                     '--lora \'{"source": "owl", "region": [0, 0, 0.5, 1]}\' (left, top, right, bottom, in fractions of the picture)')
    lines += [str(notes[method]) for method in ("k-lora", "np-lora") if isinstance(notes.get(method), str)]
    unread = notes.get("not read by this method")
    if isinstance(unread, Mapping):
        lines += [f"{name}: {what} are not read by method {notes.get('method')}" for name, what in unread.items()]
    return lines


def controls(request: Request) -> list[str]:
    """What controlled a picture besides its prompt: "canny by photo.png, strength 0.8"."""
    return [printable(_control(name, condition)) for name, condition in zip(request.condition_names, request.conditions, strict=True)]


def _control(name: str, of: Condition) -> str:
    words = f"{name} by {pictures.origin(of.image) or 'a picture'}"
    words += f" through {of.annotator}" if of.annotator and of.annotator != of.name else ""
    words += f", strength {of.strength:g}" + (f", weight {of.weight:g}" if of.weight != 1.0 else "")
    if of.start > 0.0 or of.end < 1.0:
        words += f", from {of.start:.0%} to {of.end:.0%} of the steps"
    return words


def everywhere(notes: Mapping[str, Any]) -> list[str]:
    """The LoRAs that a regional method applies everywhere: styles, places, and those without a region."""
    regional_notes = [notes[method] for method in ("clora", "regions") if isinstance(notes.get(method), Mapping)]
    return [printable(str(name)) for note in regional_notes for name in note.get("everywhere", ())]


def timeline(notes: Mapping[str, Any]) -> list[str]:
    """Which LoRA was dominant when, a letter a step, for the methods that note it."""
    if "cmlora" in notes:
        from composition.methods import cmlora

        return ["# leads, + asked in full, . from the cache; e early, l late", *cmlora.timeline(dict(notes))]
    return []
