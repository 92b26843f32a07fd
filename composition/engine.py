"""Engine: one opened model, the LoRAs it holds, and requests turned into pictures.

One request at a time per device; every request leaves the model as it found it. The Engine owns the fold: when a
method uses the same weights in every step, the sum of the LoRAs is written into a copy-protected base for the picture,
or for a whole group of requests.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from composition import backbones, library, methods
from composition.adapters import Adapters
from composition.backbones import samplers
from composition.backbones.base import Backbone
from composition.methods import Method
from composition.request import Lora, Receipt, Refused, Request, Result
from composition.run import Run
from composition.sampler import Step, sample

_LOCKS: dict[str, threading.RLock] = {}  # one per device: two engines on one device take turns
FOLD_FROM = 4  # steps from which writing the weights costs less than computing the adapters in every step


class Event(NamedTuple):
    """Progress: steps done of the whole request (all its pictures), which picture, and the latents just made."""

    index: int
    count: int
    picture: int
    latents: Tensor


class Engine:
    """A model that composes. Make it with `Engine.open`; use it as a context manager or `close` it to let go of it."""

    def __init__(
        self, backbone: Backbone, name: str, *, folders: Sequence[Path] = (), together: int = 1, fold: bool = True
    ) -> None:
        self.backbone = backbone
        self.name = name
        self.folders = tuple(Path(folder) for folder in folders)
        self.together = together
        self.fold = fold
        self.adapters = Adapters(backbone.components, family=backbone.family, block=backbone.block, axis=backbone.axis)
        self._group: ExitStack | None = None
        self._group_key: Any = None
        self._group_state: tuple[tuple[Receipt, ...], dict[Any, Any]] = ((), {})
        self._lock = _LOCKS.setdefault(str(backbone.device), threading.RLock())

    @classmethod
    def open(
        cls, model: str = "pocket", *, device: str | None = None, dtype: str | None = None, offload: str = "auto",
        folders: Sequence[Path] = (), together: int = 1, fold: bool = True, quantise: str | None = None,
        denoiser: str | None = None,
    ) -> "Engine":
        """Open a bundled name, a diffusers folder, a single .safetensors checkpoint, or a hub id.

        device and dtype None: the best of this machine. offload: "auto" (by free memory), "none", "model",
        "sequential", "group". folders: where LoRAs are looked up by name besides the bundled ones. together: how many
        pictures share a batch (1: a picture never depends on its neighbours). fold: allow writing constant weights
        into the base. quantise: "nf4", "8bit", "int8" or "fp8", for large models in little memory. denoiser: a .gguf or
        .safetensors file of FLUX's or SD3's transformer alone, in place of the model's own. Raises Refused in plain words
        when the model cannot be opened.
        """
        backbone = backbones.open(model, device=device, dtype=dtype, offload=offload, quantise=quantise, denoiser=denoiser)
        return cls(backbone, model, folders=folders, together=together, fold=fold)

    def close(self) -> None:
        """Let go of the model's hooks; the model itself is freed with the last reference to it."""
        self.adapters.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def family(self) -> str:
        return self.backbone.family

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    # LoRAs ---------------------------------------------------------------------------------------------------------

    def loras(self) -> list[Path]:
        """The LoRA files that can be named: those bundled with this model, then those in the folders."""
        return library.files(self.name, self.folders)

    def find(self, source: str) -> Path:
        """The file of a LoRA by name or path. Raises Refused with the nearest names."""
        return library.find(source, self.name, self.folders)

    def inspect(self, source: str) -> Receipt:
        """What of a LoRA file would be applied to this model; nothing is refused for being partial."""
        return self.adapters.load(self.find(source), Lora(source), allow_partial=True)

    # pictures ------------------------------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The device is the caller's alone: requests of other threads wait, its own go on. For what works on the model
        itself, as training does. Raises RuntimeError inside a group, whose LoRAs may lie in the weights."""
        with self._lock:
            if self._group is not None:
                raise RuntimeError("a group is open: its LoRAs may lie in the weights")
            yield

    @contextmanager
    def group(self) -> Iterator[None]:
        """Keep the fold and the read prompts between requests of the same LoRAs, until the group ends.

        Inside a group the base's weights may differ from the originals between requests; after it they are as before.
        """
        with self._lock:
            if self._group is not None:
                raise RuntimeError("a group is already open")
            self._group = ExitStack()
            try:
                yield
            finally:
                group, self._group, self._group_key, self._group_state = self._group, None, None, ((), {})
                group.close()

    def run(
        self, request: Request, on_step: Callable[[Event], None] | None = None, cancel: threading.Event | None = None
    ) -> Result:
        """Make the request's pictures.

        on_step sees every step. cancel: when set, the run stops before its next evaluation with Cancelled. Raises
        Refused, before anything is changed, for what cannot be done.
        """
        method = methods.find(request.method)
        options = method.read(request.options)
        if request.conditions:
            raise Refused("this request has conditions; condition LoRAs need a FLUX model and are not part of this version")
        self.backbone.size(request)
        loras = [(name, lora, self.find(lora.source)) for name, lora in zip(request.names, request.loras, strict=True)]
        request = replace(request, model=self.name).settled(*self.backbone.usual)
        seconds: dict[str, float] = {}
        with self._lock, ExitStack() as own:
            with _timed(seconds, "load"):
                scheduler = samplers.make(request.sampler, self.backbone.scheduler, request.steps)
                receipts, encodings = self._prepare(own, request, method, loras)
            notes = self._remarks(request, receipts)
            rows = list(zip(request.names, request.loras, receipts, strict=True))
            categories = {name: lora.category or receipt.category for name, lora, receipt in rows}
            triggers = {name: lora.triggers or receipt.triggers for name, lora, receipt in rows}
            images = []
            for first in range(0, request.count, self.together):
                part = request.seeds[first : first + self.together]
                run = Run(
                    self.backbone, self.adapters, request, scheduler, encodings=encodings, cancel=cancel,
                    generators=[Generator().manual_seed(seed) for seed in part], categories=categories, triggers=triggers)
                images += self._pictures(run, method, options, first, on_step, seconds)
                notes |= run.notes if first == 0 else {}
                scheduler = samplers.make(request.sampler, self.backbone.scheduler, request.steps)
            return Result(tuple(images), request, notes, seconds, receipts)

    def _prepare(
        self, own: ExitStack, request: Request, method: Method, loras: Sequence[tuple[str, Lora, Path]]
    ) -> tuple[tuple[Receipt, ...], dict[Any, Any]]:
        """Open the session (and the fold, where it serves) on the group's stack or on this request's own."""
        steady = method.steady and not any(lora.scheduled for lora in request.loras)
        worth = self._group is not None or request.length * request.count >= FOLD_FROM
        fold = self.fold and steady and worth and bool(loras)
        key = (fold, request.allow_partial, tuple((name, replace(lora, binds=None, region=None), path, _stamp(path))
                                                  for name, lora, path in loras))
        if self._group is not None:
            if key != self._group_key:
                self._group_key = None
                self._group.close()
                self._group_state = self._enter(self._group, request, loras, fold)
                self._group_key = key
            return self._group_state
        return self._enter(own, request, loras, fold)

    def _enter(
        self, stack: ExitStack, request: Request, loras: Sequence[tuple[str, Lora, Path]], fold: bool
    ) -> tuple[tuple[Receipt, ...], dict[Any, Any]]:
        receipts = stack.enter_context(self.adapters.session(loras, allow_partial=request.allow_partial))
        if fold and self.backbone.writable and self.adapters.foldable:
            stack.enter_context(self.adapters.folded(request.weights))
        return receipts, {}

    def _pictures(
        self, run: Run, method: Method, options: Any, first: int, on_step: Callable[[Event], None] | None,
        seconds: dict[str, float],
    ) -> list[Any]:
        """One batch: the method's predictions through the loop, then the pictures."""

        def tell(step: Step) -> None:
            if on_step:
                batches = -(-run.request.count // self.together)
                done = first // self.together * step.count + step.index + 1
                on_step(Event(done, step.count * batches, first, step.latents))

        try:
            with _timed(seconds, "denoise"):
                latents, timesteps = self.backbone.start(run.request, run.scheduler, run.generators)
                with method.compose(run, options) as predict:
                    latents = sample(
                        predict, run.scheduler, latents, timesteps, generator=list(run.generators), on_step=tell)
            with _timed(seconds, "decode"):
                return self.backbone.decode(latents)
        finally:
            self.backbone.release()

    def _remarks(self, request: Request, receipts: Sequence[Receipt]) -> dict[str, Any]:
        """What a user should know: trigger words that the prompt lacks, a prompt cut short, settings no method reads."""
        notes: dict[str, Any] = {"method": request.method, "evaluations": 0}
        missing = {}
        for name, lora, receipt in zip(request.names, request.loras, receipts, strict=True):
            triggers = lora.triggers or receipt.triggers
            if triggers and not any(word.lower() in request.prompt.lower() for word in triggers):
                missing[name] = list(triggers)
        if missing:
            notes["missing triggers"] = missing
        if cut := self.backbone.cut(request.prompt):
            notes["prompt cut"] = cut
        if request.negative and self.backbone.scale(request) <= 1.0:
            distilled = self.backbone.told(request) is not None
            notes["negative prompt not read"] = ("guidance was distilled into this model: set true_guidance over 1" if distilled
                                                 else "guidance is off")
        placing = methods.find(request.method).placing
        unread = [name for name, lora in zip(request.names, request.loras, strict=True)
                  if not placing and (lora.binds is not None or lora.region is not None)]
        if unread:
            notes["not read by this method"] = {name: "binds and region" for name in unread}
        return notes


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size
