"""After Ctrl-C at any instruction, and a second one while the first is cleaned up after, the same engine makes the same pictures.

As in a notebook the interrupted frames stay alive, and are let go in the middle of the next run. `python -m tests.faults.test_interrupts`
tries every instruction.
"""

import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import overrides

from composition import Engine, Lora, Request, backbones, batch
from composition.adapters import Adapters
from composition.backbones.unet import UNetBackbone
from composition.hooks import attention
from composition.loop import Step
from composition.training.concept import Plan, train
from composition.training.previews import draw
from tests import toys
from tests.composition import laws
from tests.composition.test_adapters import forward
from tests.composition.test_training import concept
from tests.faults.interrupts import NEVER, interrupted, places

FEW = 4  # places of each call in the suite
REGIONS = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
METHODS = {"merge": {}, "switch": {"tau": 1}, "cmlora": {}, "regions": {}, "clora-fast": {}, "clora": {"until": 0.5, "rounds": 0}}
LATER = (NEVER, 3, 11, 29)  # instructions from one Ctrl-C to the next


def the_engine(folder: Path, fold: bool = True) -> Engine:
    pipe = toys.sd(blocks=(16, 32))
    for seed, name in enumerate(("fox", "owl")):
        toys.lora(pipe, folder / f"{name}.safetensors", seed=seed, targets=("attn",), text=False)
    return Engine(backbones.of(pipe, "sd"), "toy", folders=[folder], fold=fold)


def asked(method: str, steps: int = 2):
    loras = [Lora(name, binds=f"the {name}", region=region) for name, region in zip(("fox", "owl"), REGIONS, strict=True)]
    return laws.request(method, *loras, steps=max(steps, 4 if method == "merge" else 2), options=METHODS[method])


def state(engine: Engine) -> tuple[object, ...]:
    return laws.fingerprint(engine), torch.overrides._get_current_function_mode_stack(), engine.adapters.names


@contextmanager
def letting_go(held: list):
    """The frames that are held are let go at the second step of a run: their contexts are closed in the middle of it."""
    yield lambda event: held.clear() if event.index == 2 else None


def check(engine: Engine, call, pictures, chosen, state=state) -> int:
    """Interrupted at each of these places the engine makes the same pictures and leaves the same model; how often it was interrupted."""
    expected, before, hits = pictures(None), state(engine), 0
    held: list = []
    for number, at in enumerate(chosen):
        error = interrupted(call, at, LATER[number % len(LATER)])
        hits += error is not None
        held.append(error)
        error = None
        with letting_go(held) as on_step:
            assert pictures(on_step) == expected, f"interrupted at instruction {at}"
        assert state(engine) == before, f"interrupted at instruction {at}"
    return hits


def some(every: list[int], count: int | None) -> list[int]:
    step = 1 if count is None else max(1, len(every) // count)
    return every[step // 2 :: step]


def run_alone(method: str, folder: Path, count: int | None) -> tuple[int, int]:
    engine = the_engine(folder)
    request = asked(method)
    engine.run(request)  # its files are read
    chosen = some(places(lambda: engine.run(request)), count)
    return check(engine, lambda: engine.run(request), lambda on_step: engine.run(request, on_step).images[0].tobytes(), chosen), len(chosen)


def run_group(folder: Path, count: int | None) -> tuple[int, int]:
    """Two methods in a group, so that folds and gates stay between requests, and the group is asked again after the interruption."""
    engine = the_engine(folder)

    def call() -> None:
        with engine.group():
            engine.run(asked("merge"))
            engine.run(asked("regions"))

    def pictures(on_step):
        with engine.group():
            return [engine.run(asked(method), on_step).images[0].tobytes() for method in ("merge", "regions", "regions")]

    call()
    chosen = some(places(call), count)
    return check(engine, call, pictures, chosen), len(chosen)


def run_inside_a_group(folder: Path, count: int | None) -> tuple[int, int]:
    """The interruption is caught inside a group, which goes on."""
    engine = the_engine(folder)
    request = asked("clora-fast")
    engine.run(request)
    before = state(engine)
    with engine.group():
        engine.run(request)
        chosen = some(places(lambda: engine.run(request)), count)
        hits = check(engine, lambda: engine.run(request), lambda on_step: engine.run(request, on_step).images[0].tobytes(), chosen,
                     state=lambda engine: state(engine)[1:])
    assert state(engine) == before
    return hits, len(chosen)


def run_batch(folder: Path, count: int | None) -> tuple[int, int]:
    engine = the_engine(folder)
    requests = [asked("merge"), asked("switch")]

    def into(place: str):
        return {item.id: item.path.read_bytes() for item in batch.run_many(engine, requests, folder / place)}

    expected, before, hits = into("whole"), state(engine), 0
    chosen = some(places(lambda: into("listed")), count)
    for number, at in enumerate(chosen):
        error = interrupted(lambda number=number: into(f"cut{number}"), at, LATER[number % len(LATER)])
        hits += error is not None
        error = None
        assert into(f"cut{number}") == expected, f"interrupted at instruction {at}"
        assert state(engine) == before
        assert not list((folder / f"cut{number}/pictures").glob(".*.tmp"))
    return hits, len(chosen)


def run_sessions(folder: Path, count: int | None) -> tuple[int, int]:
    """Adapters by themselves: sessions, folds, rows, regional gates; `repair` makes the model the bare base."""
    pipe = toys.sd(dtype=torch.float64, blocks=(16, 32))
    backbone = UNetBackbone(pipe, "sd")
    held = Adapters(backbone.components, family="sd", block=backbone.block, axis=backbone.axis)
    sources = [(name, Lora(name), toys.lora(pipe, folder / f"{name}.safetensors", seed=seed, targets=("attn",), text=False))
               for seed, name in enumerate(("one", "two"))]
    step = Step(0, 1, torch.tensor(300.0), torch.zeros(2, 4, 16, 16, dtype=torch.float64))

    @torch.no_grad()
    def call():
        with held.session(sources), held.folded({"one": 1.0}), held.session(sources[1:]):
            held.use({"two": 1.0})
            inner = forward(pipe)
        with held.session(sources), held.rows([{"one": 1.0}, {"two": 0.5}]):
            rows = forward(pipe)
            with held.combined(lambda path, step, base, each: base + each.sum(0), {"one": 0.5}, step):
                return inner, rows, forward(pipe)

    expected, hits = call(), 0
    before = {name: value.clone() for name, value in pipe.unet.named_parameters()}
    chosen = some(places(call), count)
    for number, at in enumerate(chosen):
        error = interrupted(call, at, LATER[number % len(LATER)])
        hits += error is not None
        torch.set_grad_enabled(True)
        held.repair()
        assert all(torch.equal(value, before[name]) for name, value in pipe.unet.named_parameters()) and held.names == ()
        assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True)), f"interrupted at instruction {at}"
        error = None
    return hits, len(chosen)


def run_training(folder: Path, count: int | None) -> tuple[int, int]:
    """A training with a preview, by itself on the model; afterwards the engine makes its pictures, and the checkpoint goes on."""
    engine = the_engine(folder)
    plan = Plan(rank=2, steps=2, batch=1, warm=1)
    one = concept("zog", dtype=torch.float32)
    request = asked("regions")

    def call(place: str = "x"):
        checkpoint = folder / place / "zog.training"
        with engine.exclusive():
            train(engine.backbone, engine.adapters, [one], plan, folder / place, checkpoint=checkpoint,
                  on_step=lambda step, losses: draw(engine.backbone, engine.adapters, Request("a zog", loras=[Lora("zog")], steps=1)))
        return (folder / place / "zog.safetensors").read_bytes()

    def pictures(on_step):
        return engine.run(request, on_step).images[0].tobytes()

    learned, expected, before, hits = call(), pictures(None), state(engine), 0
    chosen = some(places(call), count)
    for number, at in enumerate(chosen):
        place = f"cut{number}"
        held = [interrupted(lambda place=place: call(place), at, LATER[number % len(LATER)])]
        hits += held[0] is not None
        with letting_go(held) as on_step:
            assert pictures(on_step) == expected, f"interrupted at instruction {at}"
        assert state(engine) == before, f"interrupted at instruction {at}"
        assert call(place) == learned
    return hits, len(chosen)


@pytest.mark.parametrize("method", ["merge", "cmlora"])
def test_a_run_by_itself(method, tmp_path):
    hits, tried = run_alone(method, tmp_path, FEW if method == "cmlora" else 2 * FEW)
    assert hits >= tried - 1 >= 3  # nothing swallows an interruption


@pytest.mark.parametrize("kind", [run_group, run_inside_a_group, run_batch, run_sessions, run_training])
def test_groups_batches_and_sessions(kind, tmp_path):
    hits, tried = kind(tmp_path, FEW)
    assert hits >= tried - 1 >= 3


def stop_once(engine: Engine, layer: str):
    """A hook that is Ctrl-C inside this layer, the third time it is called; its handle."""
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    return engine.backbone.denoiser.get_submodule(layer).register_forward_pre_hook(stop)


@pytest.mark.parametrize("method", ["regions", "clora"])
@pytest.mark.parametrize("mutant", [False, True], ids=["", "mutant"])
def test_ctrl_c_inside_an_attention_layer(method, mutant, tmp_path, monkeypatch):
    """torch calls no hook of a layer that a KeyboardInterrupt leaves: the seam has to be taken off without."""
    engine = the_engine(tmp_path)
    request, modes = asked(method), torch.overrides._get_current_function_mode_stack
    expected, before = engine.run(request).images[0].tobytes(), state(engine)
    if mutant:
        monkeypatch.setattr(attention._Seam, "leave", lambda self: None)
    handle = stop_once(engine, f"{engine.backbone.localizing_layers()[0]}.to_q")
    with pytest.raises(KeyboardInterrupt):
        engine.run(request)
    handle.remove()
    if mutant:
        assert len(modes()) == 1
        overrides._pop_mode()
    else:
        assert state(engine) == before and engine.run(request).images[0].tobytes() == expected


def test_ctrl_c_while_blocks_go_through_a_cache(tmp_path):
    engine = the_engine(tmp_path)
    request, held = asked("cmlora"), []
    expected, before = engine.run(request).images[0].tobytes(), state(engine)
    handle = stop_once(engine, "mid_block")
    with pytest.raises(KeyboardInterrupt) as error:
        engine.run(request)
    held.append(error)
    handle.remove()
    assert state(engine) == before and engine.run(request, lambda event: held.clear()).images[0].tobytes() == expected


def main() -> None:
    """Every instruction of each call, or of those whose names are given; every n-th with a number."""
    names = [name for name in sys.argv[1:] if not name.isdigit()]
    count = next((int(name) for name in sys.argv[1:] if name.isdigit()), None)
    calls = {method: lambda folder, method=method: run_alone(method, folder, count) for method in METHODS}
    calls |= {kind.__name__: lambda folder, kind=kind: kind(folder, count) for kind in (run_group, run_inside_a_group, run_batch, run_sessions, run_training)}
    for name, call in calls.items():
        if not names or name in names:
            with tempfile.TemporaryDirectory() as folder:
                hits, tried = call(Path(folder))
                print(f"{name}: interrupted {hits} times at {tried} instructions, the same pictures afterwards", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
