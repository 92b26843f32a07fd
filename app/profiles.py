"""Frequency profiles kept by the LoRA's tensors: measured once, drawn, and pinned into requests of the methods that order by them.

A measured order is written into the request (options `order` and `low`), so that the picture's record makes it again anywhere.
"""

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from app import settings
from app.evaluation.charts import PALETTE
from app.strip import FAINT, INK, PAPER
from app.strip import font as lettering
from composition import Lora, Refused, Request, library
from composition.profile import Profile, ordered

MEASURES, USUAL = ("change", "level"), "change"
WIDE, HIGH = 900, 460
LEFT, RIGHT, TOP, BOTTOM = 80, 270, 40, 60


def folder() -> Path:
    """Where this user's profiles are kept."""
    return settings.home() / "profiles"


def _name(tensor_sha256: str, model: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(model).name)}-{tensor_sha256[:20]}.json"


def stored(tensor_sha256: str, model: str) -> Profile | None:
    """The profile of these tensors on this model: the user's own, else the bundled one; None when it was never measured."""
    bundled = Path(str(files("assets"))) / "pocket/profiles" if model in library.BUNDLED else None
    for place in (folder(), bundled):
        path = place / _name(tensor_sha256, model) if place else None
        if path and path.is_file():
            found = Profile.read(path.read_bytes())
            if found.tensor_sha256 == tensor_sha256:
                return found
    return None


def keep(profile: Profile, place: Path | None = None) -> Path:
    """Write it whole or not at all."""
    place = place or folder()
    place.mkdir(parents=True, exist_ok=True)
    path, part = place / _name(profile.tensor_sha256, profile.model), place / f".{secrets.token_hex(6)}.tmp"
    try:
        part.write_text(profile.json() + "\n", "utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def pinned(request: Request, engine: Any) -> tuple[Request, str]:
    """The request with the measured order of its LoRAs, where its method orders by frequency and every LoRA was profiled on
    this model; and what was done or is missing, in words ("" when it does not concern this request).

    Option order: "change" or "level" asks for it, by that number; "" takes it where it is there. Raises Refused when it is
    asked for and a LoRA was not profiled.
    """
    from composition import methods

    known = methods.find(request.method).options.__dataclass_fields__
    asked = request.options.get("order", "")
    if not {"order", "low"} <= set(known) or asked not in ("", *MEASURES) or request.options.get("low"):
        return request, ""
    if len(request.loras) < 2:
        return replace(request, options={key: value for key, value in request.options.items() if key != "order"}), ""
    found: dict[str, Profile] = {}
    missing = []
    for name, lora in zip(request.names, request.loras, strict=True):
        profile = stored(engine.inspect(lora.source).tensor_sha256, engine.name)
        if profile is None:
            missing.append(lora.source)
        else:
            found[name] = profile
    if missing:
        model = "" if engine.name == Request("").model else f" --model {engine.name}"
        verb = "is" if len(missing) == 1 else "are"
        why = f"{', '.join(missing)} {verb} not profiled on this model (medley profile {' '.join(missing)}{model})"
        if asked:
            raise Refused(f"option order={asked}: {why}")
        return request, f"order by category: {why}"
    by = asked or USUAL
    names, low = ordered(found, by)
    options = {**request.options, "order": ",".join(names), "low": ",".join(low) or "none"}
    said = f"order by measured {by} of frequency: {', '.join(names)}; low: {', '.join(low) or 'none'}"
    return replace(request, options=options), said


def measure(engine: Any, sources: Sequence[str], *, prompt: str, steps: int, seeds: int, again: bool, at: Any) -> list[tuple[Profile, bool]]:
    """(profile, whether it was measured now) of every LoRA, in order. at: an app.make.Bench for progress and Ctrl-C."""
    from composition.profile import measure as measured

    done = []
    for source in sources:
        kept = None if again or prompt else stored(engine.inspect(source).tensor_sha256, engine.name)
        if kept is not None and (kept.steps, kept.seeds) == (steps, seeds):
            done.append((kept, False))
            at.advance(2 * steps * seeds, source)
            continue
        begun = at.done
        profile = measured(engine, Lora(source), prompt=prompt, steps=steps, seeds=seeds, cancel=at.cancel,
                           on_step=lambda step, of, begun=begun, source=source: at.show(begun + step, source))  # fmt: skip
        if not prompt:
            keep(profile)
        done.append((profile, True))
    return done


def plot(profiles: Sequence[Profile]) -> Image.Image:
    """H(t) of every LoRA over the base's, as lines over the share of the steps."""
    if not profiles:
        raise ValueError("a plot needs at least one profile")
    sheet = Image.new("RGB", (WIDE, HIGH), PAPER)
    pen, font = ImageDraw.Draw(sheet), lettering(15)
    courses = {one.name: [a - b for a, b in zip(one.high, one.base, strict=True)] for one in profiles}
    ends = [value for course in courses.values() for value in course] + [0.0]
    room = 0.1 * (max(ends) - min(ends)) or 0.01
    low, high = min(ends) - room, max(ends) + room

    def spot(share: float, value: float) -> tuple[float, float]:
        return LEFT + share * (WIDE - LEFT - RIGHT), HIGH - BOTTOM - (value - low) / (high - low) * (HIGH - BOTTOM - TOP)

    pen.text((LEFT, 10), f"H(t) with the LoRA, less the base's: {profiles[0].model}, {profiles[0].steps} steps, {profiles[0].seeds} seeds", INK, font)
    for index in range(5):
        value = low + (high - low) * index / 4
        y = spot(0, value)[1]
        pen.line([(LEFT, y), (WIDE - RIGHT, y)], "#dddddd")
        pen.text((8, y - 9), f"{value:+.3f}", FAINT, font)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        pen.text((spot(share, 0)[0] - 15, HIGH - BOTTOM + 8), f"{share:.0%}", FAINT, font)
    pen.text((LEFT, HIGH - 28), "share of the steps", FAINT, font)
    pen.line([spot(0, 0.0), spot(1, 0.0)], "#888888", 2)
    pen.text((WIDE - RIGHT + 40, 10), "change, level", FAINT, font)
    for index, (name, course) in enumerate(courses.items()):
        colour = PALETTE[index % len(PALETTE)]
        points = [spot((step + 1) / len(course), value) for step, value in enumerate(course)]
        pen.line(points, colour, 3, joint="curve")
        y = TOP + 22 * index
        pen.line([(WIDE - RIGHT + 12, y + 9), (WIDE - RIGHT + 34, y + 9)], colour, 3)
        pen.text((WIDE - RIGHT + 40, y), f"{name[:12]} {profiles[index].change:+.3f} {profiles[index].level:+.3f}", INK, font)
    return sheet


def described(profiles: Sequence[Profile]) -> tuple[list[str], list[str]]:
    """(names by falling frequency, those that are low) of these."""
    by_name: Mapping[str, Profile] = {one.name: one for one in profiles}
    if len(by_name) < len(profiles):
        raise Refused("two of these LoRAs have the same name; profile them one by one")
    return ordered(by_name)

