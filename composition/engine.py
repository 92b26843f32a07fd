"""Engine: one opened model, the LoRAs it holds, and requests turned into pictures.

One request at a time per device; every request leaves the model as it found it. The Engine owns the fold: when a
method uses the same weights in every step, the sum of the LoRAs is written into a copy-protected base for the picture,
or for a whole group of requests.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Generator, Tensor

from composition import backbones, inversions, methods, named, passes, pictures, prompt_syntax, starting, windows
from composition.adapters import Adapters
from composition.backbones import schedulers
from composition.backbones.base import Backbone
from composition.backbones.encodings import Encodings
from composition.backbones.loading import placement
from composition.condition_sources import ConditionSources, Control
from composition.conditions import Shelf
from composition.hooks import attention, banks, cache, control_lora, controlnet
from composition.loop import Step
from composition.loras import library, reader, speed
from composition.methods import Method
from composition.methods.shared import measured_order
from composition.notes import opening_notes, unranked
from composition.profiles.store import ProfileStore
from composition.refusal import Refused
from composition.request import ALWAYS_NOTE, ALWAYS_ON, VAE_NOTE, Lora, Receipt, Request, Result
from composition.run import Run

_LOCKS: dict[str, threading.RLock] = {}  # one per device: two engines on one device take turns
FOLD_FROM = 4  # steps from which writing the weights costs less than computing the adapters in every step


class Event(NamedTuple):
    """Progress: steps done of the whole request (all its pictures), which picture, and the latents just made."""

    index: int
    count: int
    picture: int
    latents: Tensor


class _Prepared(NamedTuple):
    """What a run finds when its LoRAs are in place. fold: what a user should know of it."""

    receipts: tuple[Receipt, ...] = ()
    encodings: dict[Any, Tensor] = {}
    fold: str = ""
    shelf: Shelf = {}


class Engine:
    """A model that composes. Make it with `Engine.open`; use it as a context manager or `close` it to let go of it."""

    def __init__(
        self, backbone: Backbone, name: str, *, folders: Sequence[Path] = (), together: int = 1, fold: bool = True,
        profiles: ProfileStore | None = None, resolve: Callable[[str], Path] | None = None, vae: str = "",
    ) -> None:
        self.backbone = backbone
        self.name = name
        self.vae = vae
        self.folders = tuple(Path(folder) for folder in folders)
        self.profiles = profiles or ProfileStore()
        self._resolve = resolve or (lambda source: library.find(source, self.name, self.folders))
        self.together = together
        self.fold = fold
        self.adapters = Adapters(backbone.components, family=backbone.family, block=backbone.block, axis=backbone.axis)
        self._group: ExitStack | None = None
        self._group_key: Any = None
        self._group_state: _Prepared = _Prepared()
        self._exclusive = False
        self._running: tuple[int, bool] | None = None  # when the run that is not over began, and whether gradients were on
        self._controls = ConditionSources(backbone, name, self.folders)
        self._lock = _LOCKS.setdefault(str(backbone.device), threading.RLock())

    @classmethod
    def open(
        cls, model: str = "pocket", *, device: str | None = None, dtype: str | None = None, offload: str = "auto",
        folders: Sequence[Path] = (), together: int = 1, fold: bool = True, quantize: str | None = None,
        denoiser: str | None = None, profiles: ProfileStore | None = None, resolve: Callable[[str], Path] | None = None,
        vae: str | None = None,
    ) -> "Engine":
        """Open a bundled name, a diffusers folder, a single .safetensors checkpoint, or a hub id.

        device and dtype None: the best of this machine. offload: "auto" (by free memory), "none", "model",
        "sequential", "group". folders: where LoRAs are looked up by name besides the bundled ones. together: how many
        pictures share a batch (1: a picture never depends on its neighbours). fold: allow writing constant weights
        into the base. quantize: "nf4", "8bit", "int8" or "fp8", for large models in little memory. denoiser: a .gguf or
        .safetensors file of FLUX's or SD3's transformer alone, in place of the model's own. profiles: where measurements of
        LoRAs are looked up (the bundled ones). resolve: a LoRA's source to its file, in place of the search in `folders`; raises
        Refused for what is not there. vae: a folder, a .safetensors file or a hub id of an autoencoder in place of the model's own.
        Raises Refused in plain words when the model cannot be opened.
        """
        backbone = backbones.open(model, device=device, dtype=dtype, offload=offload, quantize=quantize, denoiser=denoiser, vae=vae)
        return cls(backbone, model, folders=folders, together=together, fold=fold, profiles=profiles, resolve=resolve, vae=vae or "")

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
        return self._resolve(source)

    def find_condition(self, source: str) -> Path:
        """What a condition is read with, by name or path: a condition LoRA or a ControlNet. Raises Refused as `find`."""
        return self._controls.find(source)

    def conditions(self) -> list[Control]:
        """What can be named as the source of a condition: those bundled with this model, then those in the folders."""
        return self._controls.listed()

    def inspect(self, source: str) -> Receipt:
        """What of a LoRA file would be applied to this model; nothing is refused for being partial."""
        with self._lock:
            return self.adapters.load(self.find(source), Lora(source), allow_partial=True)

    def prefetch(self, request: Request) -> None:
        """Read the LoRAs of a request that comes soon, in another thread, while this one draws. What is wrong with them is said in its turn."""
        paths = []
        for lora in request.loras:
            with suppress(Refused):
                paths.append(self.find(lora.source))
        self.adapters.prefetch(paths, allow_partial=request.allow_partial)

    # pictures ------------------------------------------------------------------------------------------------------

    def settle(self, request: Request) -> tuple[Request, dict[str, Any]]:
        """The request with everything that it leaves open made explicit, and notes on what was decided.

        Model, steps and guidance are this model's own; <lora:...> tags of the prompt become LoRAs, embedding:... textual inversions; masks and pictures of conditions are
        read, once, into the request, and what draws the latter is named; speed LoRAs get the category that says so; LoRAs get the steps of their category where it asks for windows; the
        methods that order LoRAs by frequency get the measured order where every LoRA has a profile (options order and low). A settled
        request settles to itself. Raises Refused for a LoRA, a mask or a picture that is not there.
        """
        request, tagged = prompt_syntax.settled(request, self.find)
        request = inversions.settled(request, self.find)
        notes: dict[str, Any] = {prompt_syntax.TAGGED: tagged} if tagged else {}
        loras = [replace(lora, region=pictures.mask_as_text(lora.region, lora.name)) if isinstance(lora.region, str) else lora
                 for lora in request.loras]
        controls = [replace(control, image=pictures.condition_as_text(control.image, control.name), annotator=self._controls.annotator(control))
                    for control in request.conditions]
        request = replace(request, model=self.name, vae=self.vae, loras=loras, conditions=controls).settled(*self.backbone.defaults)
        request, fitted = starting.settled(request, self.backbone)
        notes |= fitted
        request = named.settled(request, lambda lora: lora.triggers or self.inspect(lora.source).triggers)
        request = replace(request, loras=[replace(lora, category=ALWAYS_ON) if not lora.category and speed.is_one(self.find(lora.source)) else lora
                                          for lora in request.loras])
        request = windows.settled(request, lambda lora: lora.category or self.inspect(lora.source).category)
        options = methods.find(request.method).options.__dataclass_fields__
        if not measured_order.concerns(request, options):
            return request, notes
        hashes = {name: self.inspect(lora.source).tensor_sha256 for name, lora in zip(request.names, request.loras, strict=True)}
        request, order = measured_order.pinned(
            request, options, {name: self.profiles.frequency(tensors, self.name) for name, tensors in hashes.items()})
        return request, notes | ({"order": order} if order else {})

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The device is the caller's alone: requests of other threads wait, its own go on. For what works on the model
        itself, as training does. A group that is open ends: its LoRAs may lie in the weights."""
        with self._lock:
            self._end_group()
            self._repair()
            before, self._exclusive = self._exclusive, True
            try:
                yield
            finally:
                self._exclusive = before

    @contextmanager
    def group(self) -> Iterator[None]:
        """Keep the fold and the read prompts between requests of the same LoRAs, until the group ends.

        Inside a group the base's weights may differ from the originals between requests; after it they are as before. A group that
        begins inside another ends it: the requests that follow are made by themselves. (Whether the other is one that Ctrl-C left open
        cannot be known.)
        """
        with self._lock:
            self._end_group()
            group = self._group = ExitStack()
            try:
                yield
            finally:
                if self._group is group:
                    self._end_group()

    def _end_group(self) -> None:
        group, self._group, self._group_key, self._group_state = self._group, None, None, _Prepared()
        if group is not None:
            group.close()

    def run(
        self, request: Request, on_step: Callable[[Event], None] | None = None, cancel: threading.Event | None = None
    ) -> Result:
        """Make the request's pictures.

        on_step sees every step. cancel: when set, the run stops before its next evaluation with Cancelled. Raises
        Refused, before anything is changed, for what cannot be done, and for a picture whose numbers overflow.
        """
        method = methods.find(request.method)
        method.read(request.options)
        self._controls.check(request)
        self.backbone.size(request)
        whole, settled = self.settle(request)
        parts = starting.passes(whole, self.backbone)
        request = parts[0].shown
        loras = [(name, lora, self.find(lora.source)) for name, lora in zip(request.names, request.loras, strict=True)]
        paths = [{name: self._controls.find(condition.source) for name, condition in part.shown.controls.items()} for part in parts]
        words = inversions.opened(request, self.find, self.backbone)
        options = method.read(request.options)
        seconds: dict[str, float] = {}
        with self._lock, self._undisturbed(), ExitStack() as own:
            with passes.timed(seconds, "load"):
                for part in parts:
                    schedulers.make(request.sampler, self.backbone.scheduler, part.whole.steps)  # Refused before anything is changed
                receipts, encodings, fold, shelf = self._prepare(own, request, method, loras)
                acting = [self._controls.opened(part.shown, files, self.backbone.size(part.shown), isolated=not self._steady(request, method),
                                                shelf=shelf) for part, files in zip(parts, paths, strict=True)]
            conditions = acting[0]
            notes = opening_notes(request, receipts, self.backbone) | settled | ({"fold": fold} if fold else {})
            notes |= unranked(request, method, self.adapters) | starting.noted(whole, parts) | inversions.noted(request, words)
            notes |= {VAE_NOTE: vae_sha256} if (vae_sha256 := self.backbone.vae_sha256) else {}
            if conditions is not None:
                notes |= {**conditions.notes} | ({"conditions isolated": True} if conditions.isolated and request.active else {})
            rows = list(zip(request.names, request.loras, receipts, strict=True))
            categories = {name: lora.category or receipt.category for name, lora, receipt in rows}
            triggers = {name: lora.triggers or receipt.triggers for name, lora, receipt in rows}
            always = {name: lora for name, lora, _ in rows if name in self.adapters.always}
            notes |= {ALWAYS_NOTE: list(always)} if always else {}
            tensors = {name: receipt.tensor_sha256 for name, _, receipt in rows}
            folding = partial(self._fold, request=request) if self._may_fold(request) and not self.adapters.in_weights else None
            images = []
            for first in range(0, request.count, self.together):
                seeds = request.seeds[first : first + self.together]
                runs = [Run(self.backbone, self.adapters, part.shown, schedulers.make(request.sampler, self.backbone.scheduler, part.whole.steps),
                            encodings=encodings, cancel=cancel, generators=[Generator().manual_seed(seed) for seed in seeds],
                            categories=categories, triggers=triggers, always=always, conditions=conditions, tensors=tensors,
                            profiles=self.profiles, folding=folding, inversions=words) for part, conditions in zip(parts, acting, strict=True)]
                images += self._pictures(runs, parts, whole, method, options, first, on_step, seconds)
                if first == 0:
                    notes |= runs[0].notes | {"evaluations": sum(run.notes.get("evaluations", 0) for run in runs)}
            return Result(tuple(images), whole, notes, seconds, receipts, conditions.receipts if conditions else {})

    def _prepare(
        self, own: ExitStack, request: Request, method: Method, loras: Sequence[tuple[str, Lora, Path]]
    ) -> "_Prepared":
        """Open the session (and the fold, where it serves) on the group's stack or on this request's own."""
        fold = self._steady(request, method) and self._may_fold(request)
        always = always_on(request, method)
        key = (fold, always, request.allow_partial, tuple((name, replace(lora, binds=None, region=None), path, reader.stamp(path))
                                                  for name, lora, path in loras))
        if self._group is not None:
            intact = sorted((*self.adapters.names, *self.adapters.always)) == sorted(request.names) and self.adapters.whole
            if key != self._group_key or not intact:
                self._group_key = None
                self._group.close()
                self._group_state = self._enter(self._group, request, loras, fold, always)
                self._group_key = key
            return self._group_state
        return self._enter(own, request, loras, fold, always)

    def _steady(self, request: Request, method: Method) -> bool:
        """Whether every evaluation has the same LoRAs on at the same weights, in all of its rows."""
        anchored = request.anchored and self.backbone.scale(request) > 1.0
        return method.steady and not anchored and not any(lora.scheduled for lora in request.loras)

    def _may_fold(self, request: Request) -> bool:
        """Whether weights that stay the same are worth writing."""
        return self.fold and bool(request.loras) and (self._group is not None or request.length * request.count >= FOLD_FROM)

    def _enter(
        self, stack: ExitStack, request: Request, loras: Sequence[tuple[str, Lora, Path]], fold: bool, always: tuple[str, ...],
    ) -> "_Prepared":
        self._repair()
        receipts = stack.enter_context(self.adapters.session(loras, allow_partial=request.allow_partial, always=always))
        return _Prepared(receipts, Encodings(), self._fold(stack, request) if fold else "", {})

    def _repair(self) -> None:
        """Undo what a run has left that was interrupted while it cleaned up; the session of a training that is at work stays."""
        if not (self._exclusive and self.adapters.learning):
            self.adapters.repair()

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """A run that leaves neither hooks in the denoiser nor gradients off in this thread, wherever it is interrupted; what its end
        could not undo any more the next run does."""
        self._abandon(self._running)
        mine = attention.mark(), torch.is_grad_enabled()
        try:
            self._running = mine
            yield
        except BaseException:
            self._abandon(mine)
            raise
        self._running = None

    def _abandon(self, run: tuple[int, bool] | None) -> None:
        """Undo what is left of this run, unless it is over: an interrupted context may be closed at any time later."""
        if run is not None and run is self._running:
            attention.abandon(self.backbone.denoiser, run[0])
            banks.abandon(self.backbone.denoiser, run[0])
            cache.abandon(self.backbone.denoiser)
            controlnet.abandon(self.backbone.denoiser)
            control_lora.abandon(self.backbone.denoiser)
            torch.set_grad_enabled(run[1])
            self._group_key = None  # the next request of the group gets gates that no interrupted context will touch
            self._running = None

    def _fold(self, stack: ExitStack, request: Request) -> str:
        """Fold where that can be done; what is not the usual thing about it, in words ("" when the copies lie beside the weights)."""
        if not self.backbone.writable:
            return "computed live: offloaded weights come layer by layer"
        if not self.adapters.foldable:
            return "computed live: the weights are quantized, or a LoRA changes a bias that its layer does not have"
        keep = self.adapters.keep(placement.available)
        if keep.device is None:
            return keep.why
        try:
            stack.enter_context(self.adapters.folded({name: request.weights[name] for name in self.adapters.names}, keep.device))
        except torch.OutOfMemoryError:
            return f"computed live: {self.device} ran out of memory while they were folded"
        return "" if keep.beside else keep.why

    def _pictures(
        self, runs: Sequence[Run], parts: Sequence[starting.Pass], whole: Request, method: Method, options: Any, first: int,
        on_step: Callable[[Event], None] | None, seconds: dict[str, float],
    ) -> list[Image.Image]:
        """One batch: pass after pass, the method's predictions through the loop, then the pictures."""
        lengths, done = [part.shown.length for part in parts], 0
        picture = whole.picture and pictures.start(whole.picture.image)
        start: Any = [picture] * len(runs[0].generators) if picture else None
        images: list[Image.Image] = []
        for run, part in zip(runs, parts, strict=True):

            def tell(step: Step, before: int = done) -> None:
                if on_step:
                    batches, total = -(-whole.count // self.together), sum(lengths)
                    on_step(Event(first // self.together * total + before + step.index + 1, total * batches, first, step.latents))

            mask = starting.repaint(whole.picture, self.backbone.size(part.whole))
            images, latents = passes.through(run, part, partial(method.compose, run, options), start, mask, tell, seconds)
            if mask is not None and whole.picture is not None:
                images = [starting.composed(image, old, mask, whole.picture.soft) for image, old in zip(images, start, strict=True)]
            done += part.shown.length
            if part is not parts[-1]:
                start = starting.enlarged(images, latents, whole, self.backbone.size(parts[-1].whole))
        return images


def always_on(request: Request, method: Method) -> tuple[str, ...]:
    """The LoRAs that are a part of the base, whatever the method does with the others; none where it adds all up in every step and row anyway."""
    return () if method.steady and not request.anchored else tuple(name for name in request.active if name not in request.composed)
