"""One training from the opened model to the receipt: what it will do, progress, previews, a stop that can be resumed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from app import engines, settings, workbench
from app.cli.progress import PREVIEWS, Bar, alone, explained, save_strip, spared
from app.terminal import printable
from composition import Lora, Request, __version__, atomic

if TYPE_CHECKING:
    from composition import Engine
    from composition.training.plan import Concept, Plan


@dataclass(frozen=True)
class Lesson:
    """One concept: the folder of its pictures, the word it is learned under, and what its file will say."""

    images: Path
    trigger: str
    name: str
    category: str
    title: str


@dataclass(frozen=True)
class TrainConfig:
    """What the user asked for; None: the model's default."""

    model: str
    folder: Path
    steps: int | None = None
    rank: int | None = None
    rate: float | None = None
    batch: int | None = None
    targets: tuple[str, ...] | None = None
    seed: int = 0
    flip: bool = True
    preview_every: int | None = None
    preview_prompts: tuple[str, ...] = ()
    checkpointing: bool | None = None
    device: str | None = None
    dtype: str | None = None


def learn(lessons: Sequence[Lesson], config: TrainConfig, out: Console, err: Console) -> bool:
    """Train and write every LoRA; False when Ctrl-C stopped it, after printing how to resume.

    Raises Refused, before the model is opened where that is possible, for what cannot be learned from.
    """
    engines.prepare(config.model)
    from composition.training import defaults, pictures
    from composition.training.concept import train
    from composition.training.state import reached

    folders = [pictures.read(lesson.images, lesson.trigger, lesson.category) for lesson in lessons]
    for lesson, folder in zip(lessons, folders, strict=True):
        described = f"{len(folder)} captions" if folder.captions else "no captions, so plain prompts"
        out.print(Text(f"{lesson.trigger}: {len(folder)} pictures, {described}" + (f"; {folder.remark}" if folder.remark else "")))
    checkpoint = config.folder / f"{'+'.join(lesson.name for lesson in lessons)[:120]}.training"
    place = engines.EngineOptions(config.device, defaults.dtype_for(config.device, config.dtype), "none")
    with engines.open_engine(config.model, place) as engine, ExitStack() as held:
        usual = defaults.of(engine.backbone)
        plan = _plan(config, usual, defaults.halves(engine.device, engine.dtype) and config.dtype != "float32")
        _say(plan, engine, out)
        config.folder.mkdir(parents=True, exist_ok=True)
        for lesson in lessons:
            held.enter_context(alone(config.folder, lesson.name))
        atomic.sweep(config.folder, shared=True)
        begun = reached(checkpoint) if checkpoint.is_file() else 0
        concepts = [_concept(lesson, folder, engine, plan, usual.count(len(folder)), config)
                    for lesson, folder in zip(lessons, folders, strict=True)]
        shown = _Previews(lessons, config, engine, plan, err)
        if begun:
            out.print(Text(f"going on from step {begun} of {plan.steps} ({checkpoint})"))
        else:
            shown.base()
        with engine.exclusive(), workbench.stoppable() as stop, Bar(plan.steps, begun, err) as bar:

            def on_step(step: int, losses: Mapping[str, float]) -> None:
                bar.show(step, losses)
                shown.at(step)

            with explained(checkpoint, bar, err):
                files = train(
                    engine.backbone, engine.adapters, concepts, plan, config.folder, checkpoint=checkpoint, on_step=on_step,
                    stop=stop.is_set, describe=shown.describe,
                    checkpointing=usual.checkpointing if config.checkpointing is None else config.checkpointing)  # fmt: skip
        if not files:
            err.print(Text(f"medley: stopped at step {bar.step} of {plan.steps}; the same command goes on from there "
                           f"(to begin again, delete {checkpoint})"))  # fmt: skip
            return False
        checkpoint.unlink(missing_ok=True)
        _report(lessons, files, shown, engine, config, out)
        return True


def _plan(config: TrainConfig, usual: Any, half: bool) -> "Plan":
    from composition.training.plan import Plan

    overrides = {name: getattr(config, name) for name in ("steps", "rank", "rate", "batch", "targets")}
    chosen = {name: getattr(usual, name) if value is None else value for name, value in overrides.items()}
    return Plan(**chosen, noise=usual.noise, keep=usual.keep, empty=0.0, half=half, seed=config.seed)


def _say(plan: "Plan", engine: "Engine", out: Console) -> None:
    """Print what the training will do, before it starts."""
    half = ", products in bfloat16" if plan.half else ""
    out.print(Text(f"model {engine.name} on {engine.device}{half}"))
    out.print(Text(f"{plan.steps} steps of {plan.batch} pictures of each, rank {plan.rank}, rate {plan.rate:g}, layers "
                   f"{', '.join(plan.targets)}, seed {plan.seed}"))  # fmt: skip


def _concept(lesson: Lesson, folder: Any, engine: "Engine", plan: "Plan", views: int, config: TrainConfig) -> "Concept":
    from composition.training import captions, header, pictures
    from composition.training.concept import latents_of
    from composition.training.plan import Concept

    size = engine.backbone.size(Request(prompt=""))
    pixels, prompts = pictures.views(
        folder, lesson.trigger, lesson.category, size, views, flip=config.flip, seed=f"{plan.seed}/{lesson.name}")
    metadata = header.header(
        engine.backbone, engine.name, plan, title=lesson.title, category=lesson.category, trigger=lesson.trigger,
        pictures=len(folder), size=size, software=f"medley {__version__}")
    return Concept(
        lesson.name, latents_of(engine.backbone, pixels, part=8), prompts, metadata,
        origin=f"{metadata['base']} {size} {views} {config.flip} {folder.origin}", others=captions.others())


class _Previews:
    """A strip of pictures of every concept, every so many steps, with the same seeds: NAME-previews/STEP.png."""

    def __init__(self, lessons: Sequence[Lesson], config: TrainConfig, engine: "Engine", plan: "Plan", err: Console) -> None:
        self.lessons, self.config, self.engine, self.plan, self.err = lessons, config, engine, plan, err
        usual = max(1, plan.steps // (PREVIEWS - 1))
        self.every = usual if config.preview_every is None else config.preview_every

    def folder(self, lesson: Lesson) -> Path:
        return self.config.folder / f"{lesson.name}-previews"

    def base(self) -> None:
        """The base's own pictures of the prompts."""
        if self.every:
            for lesson in self.lessons:
                with spared(lesson.name, 0, self.err):
                    self._save(lesson, 0, lambda request: list(self.engine.run(request).images), [])

    def at(self, step: int) -> None:
        if self.every and (step % self.every == 0 or step == self.plan.steps):
            for lesson in self.lessons:
                with spared(lesson.name, step, self.err):
                    self._save(lesson, step, self._draw, [Lora(lesson.name)])

    def describe(self, name: str) -> Mapping[str, str]:
        """The small picture for the header of a finished LoRA."""
        from composition.training.previews import thumbnail

        lesson = next(lesson for lesson in self.lessons if lesson.name == name)
        request = Request(prompt=self.prompts(lesson)[0], loras=[Lora(name)], seed=self.plan.seed)
        with spared(name, self.plan.steps, self.err):
            return {"preview": thumbnail(self._draw(request)[0])}
        return {}

    def prompts(self, lesson: Lesson) -> tuple[str, ...]:
        from composition.training import captions

        return self.config.preview_prompts or captions.examples(lesson.trigger, lesson.category)

    def _draw(self, request: Request) -> list[Image.Image]:
        from composition.training.previews import draw

        return draw(self.engine.backbone, self.engine.adapters, request)

    def _save(
        self, lesson: Lesson, step: int, draw: Callable[[Request], list[Image.Image]], loras: Sequence[Lora]
    ) -> None:
        tiles = []
        for prompt in self.prompts(lesson):
            request = Request(prompt=prompt, loras=loras, seed=self.plan.seed, count=2)
            tiles += [(picture, prompt, f"seed {seed}") for picture, seed in zip(draw(request), request.seeds, strict=True)]
        save_strip(self.folder(lesson), lesson.name, step, self.plan.steps, tiles)


def _report(
    lessons: Sequence[Lesson], files: Mapping[str, Path], shown: _Previews, engine: "Engine", config: TrainConfig, out: Console
) -> None:
    """The receipt of every LoRA, and the command that uses it."""
    for lesson in lessons:
        out.print(Text(printable(engine.inspect(str(files[lesson.name])).line())))
        if shown.every:
            out.print(Text(f"previews: {shown.folder(lesson)}"))
        where = "" if config.folder == settings.lora_folder() else f' --lora-dir "{config.folder}"'
        model = "" if config.model == "pocket" else f" --model {config.model}"
        out.print(Text(f'{files[lesson.name]}\nuse it: medley generate "{shown.prompts(lesson)[-1]}" --lora {lesson.name}'
                       f"{where}{model}"))  # fmt: skip
