"""The training of gates from the opened model to the file: the LoRAs, the pictures they are learned from, progress, a stop that can be resumed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from app import engines, workbench
from app.cli.progress import Bar, alone, explained
from app.terminal import printable
from composition import Lora, Refused, atomic

if TYPE_CHECKING:
    from composition import Engine
    from composition.profiling.gate_pictures import Known


@dataclass(frozen=True)
class GateConfig:
    """What the user asked for. loras: none for all that can be named."""

    name: str
    loras: tuple[str, ...]
    model: str
    folder: Path
    kind: Any
    film: bool
    shared: bool
    pictures: int
    pairs: int
    steps: int
    rows: int
    rate: float
    apart: float
    seed: int
    device: str | None = None
    dtype: str | None = None


def learn(config: GateConfig, out: Console, err: Console) -> bool:
    """Draw the pictures, train, and write the gates; False when Ctrl-C stopped it, after printing how to resume.

    Raises Refused for what cannot be learned from.
    """
    from composition.profiling import gate_pictures
    from composition.training import defaults, gates

    plan = gates.Plan(config.kind, config.film and config.kind == "rank", config.shared and config.kind == "element", config.steps, config.rate,
                      config.apart, seed=config.seed, half=False)  # fmt: skip
    checkpoint = config.folder / f"{config.name}.training"
    place = engines.EngineOptions(config.device, defaults.dtype_for(config.device, config.dtype), "none")
    with engines.open_engine(config.model, place) as engine, workbench.stoppable() as stop:
        known = _known(engine, config.loras)
        out.print(Text(f"{len(known)} LoRAs of {engine.name} on {engine.device}: {', '.join(known)}"))
        config.folder.mkdir(parents=True, exist_ok=True)
        with alone(config.folder, config.name):
            atomic.sweep(config.folder, shared=True)
            groups = len(known) + min(config.pairs, len(known) * (len(known) - 1) // 2)
            with Bar(groups, 0, err, "drawing") as bar:
                drawn = gate_pictures.draw(engine, known, each=config.pictures, pairs=config.pairs, seed=config.seed, stop=stop.is_set,
                                           on_group=lambda done, of: bar.show(done, {}))  # fmt: skip
            if stop.is_set():
                err.print(Text("medley: stopped while pictures were drawn; nothing was kept"))
                return False
            loras = {name: (each.lora, engine.find(each.lora.source), each.category) for name, each in known.items()}
            with engine.exclusive(), Bar(plan.steps, _reached(checkpoint), err) as bar, explained(checkpoint, bar, err):
                file = gates.train(
                    engine.backbone, engine.adapters, loras, gate_pictures.FromDrawn(drawn, known, config.rows, config.seed), plan,
                    config.folder / f"{config.name}.safetensors", base=engine.name, checkpoint=checkpoint, stop=stop.is_set,
                    on_step=lambda step, loss, kept: bar.show(step, {"loss": loss}), title=config.name)  # fmt: skip
            if file is None:
                err.print(Text(f"medley: stopped at step {bar.step} of {plan.steps}; the same command goes on from there "
                               f"(to begin again, delete {checkpoint})"))  # fmt: skip
                return False
            checkpoint.unlink(missing_ok=True)
            out.print(Text(f"{file}: gates of kind {config.kind} for {engine.name}. Use them with: medley generate --method autolora --option gates={file}"))
            return True


def _known(engine: "Engine", sources: tuple[str, ...]) -> "dict[str, Known]":
    """The LoRAs, with the words that call them. Raises Refused for two of one name, and for fewer than two."""
    from composition.profiling.gate_pictures import Known

    known: dict[str, Known] = {}
    for source in sources or [str(path) for path in engine.loras()]:
        receipt = engine.inspect(source)
        lora = Lora(source)
        if lora.name in known:
            raise Refused(f"two LoRAs are called {lora.name}: name each once")
        known[lora.name] = Known(lora, receipt.category, printable(next(iter(receipt.triggers), lora.name.replace("_", " "))))
    if len(known) < 2:
        raise Refused(f"gates are learned from two LoRAs or more; here is {len(known)}: name some, or put them into your LoRA folder")
    return known


def _reached(checkpoint: Path) -> int:
    from composition.training.gates import reached

    return reached(checkpoint) if checkpoint.is_file() else 0
