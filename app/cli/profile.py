"""`medley profile`: frequency profiles of LoRAs, measured once and kept."""

from collections.abc import Mapping, Sequence

from app.workbench import Workbench
from composition import Lora, Refused
from composition.profiles.frequency import Profile, ordered


def measure(at: Workbench, sources: Sequence[str], *, prompt: str, steps: int, seeds: int, again: bool) -> list[tuple[Profile, bool]]:
    """(profile, whether it was measured now) of every LoRA, in order. A profile of a prompt of the user's own is not kept."""
    from composition.profiling import frequency

    engine, measured = at.engine, []
    for source in sources:
        kept = None if again or prompt else engine.profiles.frequency(engine.inspect(source).tensor_sha256, engine.name)
        if kept is not None and (kept.steps, kept.seeds) == (steps, seeds):
            measured.append((kept, False))
            at.advance(2 * steps * seeds, source)
            continue
        begun = at.done
        profile = frequency.measure(
            engine, Lora(source), prompt=prompt, steps=steps, seeds=seeds, cancel=at.cancel,
            on_step=lambda step, _, begun=begun, source=source: at.show(begun + step, source))
        if not prompt:
            engine.profiles.keep(profile)
        measured.append((profile, True))
    return measured


def described(profiles: Sequence[Profile]) -> tuple[list[str], list[str]]:
    """(names by falling frequency, those that are low) of these. Raises Refused when two have one name."""
    by_name: Mapping[str, Profile] = {profile.name: profile for profile in profiles}
    if len(by_name) < len(profiles):
        raise Refused("two of these LoRAs have the same name; profile them one by one")
    return ordered(by_name)
