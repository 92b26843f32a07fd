"""The training of a condition LoRA from the opened model to the receipt: what it will do, progress, previews, a stop that can be resumed."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.text import Text

from app import engines, settings, workbench
from app.cli.progress import PREVIEWS, Bar, alone, explained, save_strip, spared
from app.terminal import printable
from composition import Condition, Refused, Request, __version__, annotators, atomic

if TYPE_CHECKING:
    from composition import Engine
    from composition.loras.condition import Settings
    from composition.training.condition import Updates
    from composition.training.pair_pictures import PairFolder
    from composition.training.pairs import ConditionPlan

SHOWN = 2  # conditions that previews are drawn from


@dataclass(frozen=True)
class ConditionConfig:
    """What the user asked for; None: the model's default."""

    images: Path
    annotator: str
    drawn: Path | None
    name: str
    kind: str
    title: str
    model: str
    folder: Path
    size: int | None = None
    sides: tuple[int, ...] | None = None
    steps: int | None = None
    rank: int | None = None
    rate: float | None = None
    batch: int | None = None
    bias: float | None = None
    drop: float = 0.1
    seed: int = 0
    flip: bool = True
    preview_every: int | None = None
    checkpointing: bool | None = None
    device: str | None = None
    dtype: str | None = None


def learn(config: ConditionConfig, out: Console, err: Console) -> bool:
    """Train and write the condition LoRA; False when Ctrl-C stopped it, after printing how to resume.

    Raises Refused, before the model is opened where that is possible, for what cannot be learned from.
    """
    engines.prepare(config.model)
    from composition.training import defaults, pair_pictures
    from composition.training.condition import train
    from composition.training.state import reached

    folder = pair_pictures.read(config.images, config.annotator, config.drawn, config.kind)
    captioned = sum(bool(caption) for caption in folder.captions.values())
    out.print(Text(f"{config.name}: {len(folder)} pictures, {f'{captioned} captions' if captioned else 'no captions, so empty prompts'}, conditions "
                   f"{f'by {config.annotator}' if config.annotator else f'from {config.drawn}'}"))  # fmt: skip
    checkpoint = config.folder / f"{config.name}.training"
    place = engines.EngineOptions(config.device, defaults.dtype_for(config.device, config.dtype), "none")
    with engines.open_engine(config.model, place) as engine:
        if engine.backbone.family != "flux":
            raise Refused(f"condition LoRAs can be trained on FLUX (and on pocket-flux), not on {engine.name}")
        usual = defaults.of_condition(engine.backbone)
        plan = _plan(config, usual, defaults.halves(engine.device, engine.dtype) and config.dtype != "float32")
        stated = _settings(config, usual, plan, engine)
        sides = config.sides or usual.sides
        _say(plan, stated, sides, engine, out)
        config.folder.mkdir(parents=True, exist_ok=True)
        with alone(config.folder, config.name):
            atomic.sweep(config.folder, shared=True)
            begun = reached(checkpoint) if checkpoint.is_file() else 0
            count = max(len(folder), min(usual.count, 64 * len(folder)))
            learned = pair_pictures.pairs(
                engine.backbone, folder, config.name, stated, sides=sides, count=count, flip=config.flip, seed=f"{plan.seed}/{config.name}",
                words=_words(config, plan, len(folder), engine))
            shown = _Previews(config, folder, engine, plan, stated, err)
            if begun:
                out.print(Text(f"going on from step {begun} of {plan.steps} ({checkpoint})"))
            else:
                shown.draw(0, None)
            with engine.exclusive(), workbench.stoppable() as stop, Bar(plan.steps, begun, err) as bar:

                def on_step(step: int, losses: Mapping[str, float], updates: "Updates") -> None:
                    bar.show(step, losses)
                    shown.at(step, updates)

                with explained(checkpoint, bar, err):
                    file = train(
                        engine.backbone, learned, plan, config.folder, checkpoint=checkpoint, on_step=on_step, stop=stop.is_set,
                        checkpointing=usual.checkpointing if config.checkpointing is None else config.checkpointing)  # fmt: skip
            if file is None:
                err.print(Text(f"medley: stopped at step {bar.step} of {plan.steps}; the same command goes on from there "
                               f"(to begin again, delete {checkpoint})"))  # fmt: skip
                return False
            checkpoint.unlink(missing_ok=True)
            _report(config, file, shown, engine, out)
            return True


def _plan(config: ConditionConfig, usual: Any, half: bool) -> "ConditionPlan":
    from composition.training.pairs import ConditionPlan

    overrides = {name: getattr(config, name) for name in ("steps", "rank", "rate", "batch")}
    chosen = {name: getattr(usual, name) if value is None else value for name, value in overrides.items()}
    return ConditionPlan(**chosen, views=usual.views, noise=usual.noise, drop=config.drop, half=half, seed=config.seed)


def _settings(config: ConditionConfig, usual: Any, plan: "ConditionPlan", engine: "Engine") -> "Settings":
    """What the file will say of itself. Raises Refused for a size or a bias that it cannot have."""
    from composition.loras.condition import MAX_BIAS, MAX_SIZE, Kind, Settings
    from composition.training import header

    backbone: Any = engine.backbone  # a FLUX, which has tokens
    unit = backbone.pixels_per_token
    size = usual.size if config.size is None else config.size
    if not unit <= size <= MAX_SIZE or size % unit:
        raise Refused(f"--size {size}: a condition's side is a multiple of {unit} pixels, up to {MAX_SIZE}")
    bias = usual.bias if config.bias is None else config.bias
    if not abs(bias) <= MAX_BIAS:
        raise Refused(f"--bias {bias:g}: give a number from -{MAX_BIAS} to {MAX_BIAS}")
    return Settings(kind=cast(Kind, config.kind), size=size, alpha=plan.alpha, base=header.plain_name(engine.name), annotator=config.annotator,
                    offset=usual.offset, bias=bias)  # fmt: skip


def _say(plan: "ConditionPlan", stated: "Settings", sides: tuple[int, ...], engine: "Engine", out: Console) -> None:
    """Print what the training will do, before it starts."""
    out.print(Text(f"model {engine.name} on {engine.device}{', products in bfloat16' if plan.half else ''}"))
    views = f" in {plan.views} states of noise each" if plan.views > 1 else ""
    out.print(Text(f"{plan.steps} steps of {plan.batch} pairs{views}, conditions of {stated.size} pixels for pictures of about "
                   f"{', '.join(map(str, sides))}, rank {plan.rank}, rate {plan.rate:g}, bias {stated.bias:g}, seed {plan.seed}"))  # fmt: skip


def _words(config: ConditionConfig, plan: "ConditionPlan", pictures: int, engine: "Engine") -> dict[str, str]:
    from composition.training import header

    size = engine.backbone.size(Request(prompt=""))
    return header.header(engine.backbone, engine.name, plan, title=config.title, category="", trigger="", pictures=pictures, size=size,
                         software=f"medley {__version__}")  # fmt: skip


class _Previews:
    """Every so many steps, NAME-previews/STEP.png: the first conditions and what is drawn from them, with the same seeds."""

    def __init__(
        self, config: ConditionConfig, folder: "PairFolder", engine: "Engine", plan: "ConditionPlan", stated: "Settings", err: Console
    ) -> None:
        self.config, self.engine, self.plan, self.stated, self.err = config, engine, plan, stated, err
        usual = max(1, plan.steps // (PREVIEWS - 1))
        self.every = usual if config.preview_every is None else config.preview_every
        self.sources = [str(path) for path in (folder.drawn or folder.files)[:SHOWN]]
        self.captions = [folder.captions[i] for i in range(len(self.sources))]

    @property
    def folder(self) -> Path:
        return self.config.folder / f"{self.config.name}-previews"

    def at(self, step: int, updates: "Updates") -> None:
        if self.every and (step % self.every == 0 or step == self.plan.steps):
            self.draw(step, updates)

    def draw(self, step: int, updates: "Updates | None") -> None:
        """The strip of this step; the base's own pictures without an adapter."""
        if not self.every:
            return
        with spared(self.config.name, step, self.err), tempfile.TemporaryDirectory() as held:
            tiles = []
            for source, caption in zip(self.sources, self.captions, strict=True):
                request = Request(prompt=caption, model=self.engine.name, seed=self.plan.seed, count=2)
                if updates is not None:
                    file = self._file(updates, Path(held))
                    request = replace(request, conditions=[Condition(str(file), source)])
                tiles.append((_seen(source, self.config.annotator), "condition", Path(source).name))
                pictures = self.engine.run(request).images
                tiles += [(picture, caption or "(no prompt)", f"seed {seed}") for picture, seed in zip(pictures, request.seeds, strict=True)]
            save_strip(self.folder, self.config.name, step, self.plan.steps, tiles)

    def _file(self, updates: "Updates", folder: Path) -> Path:
        """The LoRA as it stands, as its file will be."""
        from composition.loras import condition as files
        from composition.loras.kinds.lora import Factors

        file = folder / f"{self.config.name}.safetensors"
        files.write(file, {path: Factors(update.down, update.up, self.plan.alpha) for path, update in updates.items()}, self.stated)
        return file


def _seen(source: str, annotator: str) -> Any:
    from composition import pictures

    return annotators.annotate(annotator, pictures.condition(source, "the condition"))


def _report(config: ConditionConfig, file: Path, shown: _Previews, engine: "Engine", out: Console) -> None:
    """The receipt, and the command that uses it."""
    from composition.loras import condition as files

    out.print(Text(printable(files.read(file, engine.backbone.denoiser).receipt.line())))
    if shown.every:
        out.print(Text(f"previews: {shown.folder}"))
    where = "" if config.folder == settings.lora_folder() else f' --lora-dir "{config.folder}"'
    out.print(Text(f'{file}\nuse it: medley generate "{shown.captions[0] or "a fox"}" --control {config.name}={shown.sources[0]}{where} '
                   f"--model {config.model}"))  # fmt: skip
