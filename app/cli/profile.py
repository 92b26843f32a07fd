"""`medley profile`: frequency profiles and behaviours of LoRAs, measured once and kept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from app import workbench
from app.workbench import Workbench
from composition import Engine, Lora, Refused
from composition.profiles.behaviour import Behaviour, Probe
from composition.profiles.frequency import Profile, ordered

if TYPE_CHECKING:
    from retrieval.judge import Judge


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


def searched(
    engine: Engine, sources: Sequence[str], *, prompt: str, steps: int | None, seeds: int | None, again: bool, judge: str, console: Console
) -> list[tuple[Behaviour, bool]]:
    """The behaviours of these LoRAs as this judge sees them, with a progress bar on `console`. Raises Refused for a prompt of the user's own."""
    from composition.profiling.behaviour import probe_of
    from retrieval.judge import Judge

    if prompt:
        raise Refused("--prompt is for frequency profiles: behaviours are compared with one another, and so measured on prompts of their own")
    usual = probe_of(engine.name)
    probe = replace(usual, steps=steps or usual.steps, seeds=seeds or usual.seeds)
    opened = Judge.open(judge)
    with workbench.bench(engine, probe.pictures * probe.steps * (1 + len(sources)), console) as at:
        return behaviours(at, sources, opened, probe, again=again)


def behaviours(at: Workbench, sources: Sequence[str], judge: "Judge", probe: Probe, *, again: bool) -> list[tuple[Behaviour, bool]]:
    """(behaviour, whether it was measured now) of every LoRA, in order. The base's pictures are drawn once, when the first LoRA needs them."""
    from composition.profiling import behaviour

    def see(pictures):
        return judge.see(pictures).numpy()

    engine, base, measured = at.engine, None, []
    for source in sources:
        kept = None if again else engine.profiles.behaviour(engine.inspect(source).tensor_sha256, engine.name, judge.name)
        if kept is not None and kept.probe == probe:
            measured.append((kept, False))
            at.advance(probe.pictures * probe.steps, source)
            continue
        if base is None:
            begun = at.done
            base = behaviour.seen(engine, see, probe, cancel=at.cancel, on_step=lambda step, begun=begun: at.show(begun + step, "base"))
        begun = at.done
        measured.append((behaviour.measure(
            engine, see, Lora(source), probe, base=base, judge=judge.name, cancel=at.cancel,
            on_step=lambda step, _, begun=begun, source=source: at.show(begun + step, source)), True))
        engine.profiles.keep(measured[-1][0])
    return measured
