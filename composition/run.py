"""Run: all that a method may touch while it makes one batch of pictures."""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from composition import inversions
from composition.adapters import Adapters
from composition.adapters.gates import Combine
from composition.adapters.stack import Route, Watch
from composition.backbones.base import Backbone
from composition.conditions import Acting, Call
from composition.guidance import guide
from composition.hooks.attention import AllRecorded, recorded
from composition.hooks.cache import Cache
from composition.hooks.costs import layer_costs, share_until
from composition.hooks.regional import Segments, joined, regional
from composition.inversions import Inversion
from composition.loop import Conditioning, Step
from composition.profiles.store import ProfileStore
from composition.prompt_weights import Text
from composition.refusal import Cancelled
from composition.request import Lora, Request
from composition.spelling import Spelling

# Latent places over which a processor is faster with one LoRA after the other than with a batch of rows: measured at Stable
# Diffusion 1.5's size (cached passes 14 % faster at 64 x 64, whole ones 4 %; at 48 x 48 whole ones 10 % slower).
PROCESSOR_BATCH = 3000
Rows = Literal["all", "positive"]  # of guidance


class Pass(NamedTuple):
    """What one prediction is made with: the LoRAs that are on, with their weights, and the prompt. name: of its cache slot."""

    use: Mapping[str, float]
    cond: Conditioning
    name: str = ""


def _none(path: str) -> bool:
    """Of a whole evaluation: it leaves no layer out."""
    return False


def grid(step: Step, level: int) -> tuple[int, int]:
    """(h, w) of the layers at this level."""
    return -(-step.latents.shape[-2] // 2**level), -(-step.latents.shape[-1] // 2**level)


@dataclass(eq=False)
class Run:
    """One batch of B pictures of a request. A method asks it for predictions; it owns nothing that outlives them.

    scheduler: this run's own instance. notes: what the method did, plain JSON values. encodings: of prompts
    already encoded, value by value, by prompt and text-LoRA weights. categories, triggers: of each LoRA by name, as the request or else
    its file says. always: those that are a part of the base (`Adapters.session`), by name, which no method
    sees. conditions: those that act in every evaluation; `read_conditions` comes first. tensors: the hash of each LoRA's
    tensors by name. profiles: what was measured of LoRAs. inversions: the request's textual inversions, by the word that
    stands for each. folding: writes the sum of the LoRAs into the weights until a stack of contexts
    ends; None where that may not be.
    """

    backbone: Backbone
    adapters: Adapters
    request: Request
    scheduler: Any
    generators: Sequence[Generator]
    notes: dict[str, Any] = field(default_factory=dict)
    encodings: dict[Any, Tensor] = field(default_factory=dict)
    cancel: threading.Event | None = None
    categories: Mapping[str, str] = field(default_factory=dict)
    triggers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    always: Mapping[str, Lora] = field(default_factory=dict)
    conditions: Acting | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    profiles: ProfileStore = field(default_factory=ProfileStore)
    folding: Callable[[ExitStack], str] | None = None
    inversions: Mapping[str, Inversion] = field(default_factory=dict)
    _shares: dict[Any, float] = field(default_factory=dict)
    _slots: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by name of a cache's slot: the conditions it was filled with
    _anchor: tuple[Step, Tensor] | None = None  # the last evaluation and the base's negative row there

    @property
    def loras(self) -> dict[str, Lora]:
        """The request's LoRAs that a method composes, by name, in order: those that are on in at least one step, the others are as if they
        were not there, without those that are always on."""
        return {name: lora for name, lora in self.request.active.items() if name not in self.always}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of `loras`, each unique."""
        return tuple(self.loras)

    def live(self, step: Step) -> dict[str, float]:
        """The LoRAs that are on at this step, with their weights: inside start..end and of a weight other than 0."""
        return {name: w for name, lora in self.loras.items() if (w := lora.weight_at(step.index, step.count)) != 0.0}

    @property
    def anchored(self) -> bool:
        """Whether the negative row is the base's own, without any LoRA: the request says so, and there is guidance and a LoRA."""
        return self.request.anchored and self._rows > 1 and bool(self.loras)

    @cached_property
    def spelling(self) -> Spelling:
        """The request's prompts, and others, as they are encoded."""
        return Spelling(self.backbone, self.request, self.inversions)

    def encode(
        self, prompt: Text | None = None, use: Mapping[str, float] | None = None, among: Sequence[Text] = ()
    ) -> Conditioning:
        """The prompt (None: the request's) and its negative, encoded with the text-encoder part of these LoRAs.

        use: name to denoiser weight (None: all of `loras` at their own); a LoRA's text_weight, when set, is used in proportion. among: prompts
        with which it is to lie in one batch: as long as the longest.
        """
        use = {name: lora.weight for name, lora in self.loras.items()} if use is None else use
        text = self.text_weights(use)
        prompt = self.spelling.prompt if prompt is None else self.spelling.spelled(prompt)
        guided = self._rows > 1
        negatives = [self.spelling.negative] if guided else None
        least = max(map(self.spelling.chunks, [prompt, *among, *(negatives or ())]))
        keys = {value: (value, prompt, *(negatives or ()), least, self._touching(text, encoders)) for value, encoders in self.backbone.reads.items()}
        if missing := [value for value, key in keys.items() if key not in self.encodings]:
            self.check_cancel()
            self.adapters.use_text({name: weight for name, weight in text.items() if weight != 0.0})
            try:
                with torch.no_grad():
                    encoded = self.backbone.encode([prompt], negatives, missing, least, inversions.vectors(self.inversions))
                self.encodings.update({keys[value]: tensor for value, tensor in encoded.values.items()})
            finally:
                self.adapters.use_text({})
        values = {value: self.encodings[key] for value, key in keys.items()}
        if (embedded := self.backbone.embedded_guidance(self.request)) is not None:
            values["guidance"] = torch.full((self._rows, 1), embedded, device=self.backbone.device)
        return Conditioning(values)

    def text_weights(self, use: Mapping[str, float]) -> dict[str, float]:
        """The weights in the text encoders of LoRAs that have these in the denoiser."""
        return {name: self._text_weight(name, weight) for name, weight in use.items()}

    def _touching(self, weights: Mapping[str, float], encoders: Collection[str]) -> tuple[tuple[str, float], ...]:
        """The weights of the LoRAs that change any of these text encoders: only with them a prompt is encoded anew."""
        return tuple(sorted((name, weight) for name, weight in weights.items()
                            if weight != 0.0 and any(self.adapters.touches(name, encoder) for encoder in encoders)))

    def read_conditions(self) -> None:
        """Let the conditions be read, once for all steps, before the first evaluation and outside any of them."""
        if self.conditions is not None:
            use = {} if self.conditions.isolated else {name: lora.weight for name, lora in self.loras.items()}
            self.conditions.fill(lambda: self.encode(use=use), self.adapters, use, self.check_cancel)

    # predictions: one, several, one by regions -----------------------------------------------------------------------

    def denoise(
        self, step: Step, use: Mapping[str, float] | None = None, cond: Conditioning | None = None, rows: Rows = "all",
        *, combine: Combine | None = None, route: Route | None = None,
    ) -> Float[Tensor, "R B *S"]:
        """One prediction with these LoRAs in every row (None: all that are live at this step), unguided.

        cond: another conditioning than the request's prompt encoded with the same LoRAs. rows="positive": R = 1. combine: makes each
        layer's output from its path, this step, the base's output and each LoRA's, in place of their sum. route: the gate of each rank
        from A x (`Adapters.routed`).
        """
        use = self.live(step) if use is None else use
        cond = self.encode(use=use) if cond is None else cond
        if rows == "all" and self.anchored and cond.rows > 1:
            return torch.cat([self._base(step), self.denoise(step, use, cond, "positive", combine=combine, route=route)])
        cond = cond.positive() if rows == "positive" else cond
        if combine is not None:
            with self.adapters.combined(combine, use, step):
                return self._evaluate(step, cond, 1)
        if route is not None:
            with self.adapters.routed(route, use, step):
                return self._evaluate(step, cond, 1)
        self.adapters.use(use)
        return self._evaluate(step, cond, 1)

    def observe(self, step: Step, use: Mapping[str, float], cond: Conditioning, watch: Watch) -> None:
        """An evaluation for the sake of what its layers show `watch` (`Adapters.watched`); no condition acts in it."""
        self.check_cancel()
        self._set_always(step)
        self.notes["evaluations"] = self.notes.get("evaluations", 0) + 1
        self.adapters.use(use)
        with self.adapters.watched(watch):
            self.backbone.denoise(self.scaled(step), step.t, cond)

    def fold(self, stack: ExitStack) -> None:
        """Write the LoRAs, as they are now, into the weights until `stack` ends, where that can be and every step and row has them alike."""
        if self.folding is not None and not self.anchored and not any(lora.scheduled for lora in self.request.loras):
            if sentence := self.folding(stack):
                self.notes["fold"] = sentence

    def passes(
        self, step: Step, conds: Mapping[str, Conditioning] | None = None, others_weight: float = 0.0
    ) -> list[Pass]:
        """A pass for each LoRA that is live at this step, with that LoRA alone, under its name; with none live the base's.

        conds: a conditioning per LoRA instead of the request's prompt encoded with the pass's LoRAs. others_weight: the share of their
        weights at which the other LoRAs are on in each pass.
        """
        live, conds = self.live(step), conds or {}
        uses = {name: {other: w if other == name else others_weight * w for other, w in live.items() if other == name or others_weight}
                for name in live} or {"": {}}
        return [Pass(use, conds[name] if name in conds else self.encode(use=use), name) for name, use in uses.items()]

    def denoise_passes(
        self, step: Step, passes: Sequence[Pass], rows: Rows = "all", *, cache: Cache | None = None, full: Collection[str] = (),
    ) -> Float[Tensor, "N R B *S"]:
        """A prediction for each pass, with its own LoRAs and prompt, in one batch of rows or one by one as the request says.

        cache: only the passes named in `full` are whole evaluations, which fill their slots; the others take the deep features from
        theirs. A slot that was filled with other conditions than act now is filled anew. Each of the two kinds is then one batch of rows, or
        one by one. Evaluations are counted in whole ones: a cached one counts by its multiply-adds, attention products left out.
        """
        if rows == "all" and self.anchored and passes[0].cond.rows > 1:
            base, positive = self._base(step), self.denoise_passes(step, passes, "positive", cache=cache, full=full)
            return torch.cat([base.expand_as(positive), positive], 1)
        passes = _with(rows, passes)
        if cache is None:
            return self._several(step, passes, 1.0)
        acting = self.conditions.live(step) if self.conditions is not None else ()
        full = {*full, *(item.name for item in passes if self._slots.get(item.name, acting) != acting)}
        self._slots |= dict.fromkeys(full, acting)
        values: dict[str, Tensor] = {}
        for kind in (True, False):
            chosen = [item for item in passes if (item.name in full) is kind]
            for group in [chosen] if self._batched(step) and chosen else [[item] for item in chosen]:
                names = [item.name for item in group]
                with cache.full(names) if kind else cache.cached(names):
                    predictions = self._several(step, group, 1.0 if kind else self._cached_share(cache, step, group[0].cond),
                                                skips=_none if kind else cache.skips)
                values |= zip(names, predictions, strict=True)
        return torch.stack([values[item.name] for item in passes])

    def denoise_regional(
        self, step: Step, passes: Sequence[Pass], shares: Float[Tensor, "B N h w"]
    ) -> Float[Tensor, "R B *S"]:
        """One evaluation in which each pass, with its LoRAs and prompt, has its share of every place (shares sum to 1 over N)."""
        if self.anchored and passes[0].cond.rows > 1:
            return torch.cat([self._base(step), self.denoise_regional(step, _with("positive", passes), shares)])
        conds = [item.cond for item in passes]
        segments = Segments(shares, conds[0].rows, grid(step, 0), conds[0].values["text"].shape[2])
        weights = {name: weight for item in passes for name, weight in item.use.items()}
        if step.index == step.stage == 0 and (names := [name for name in self.adapters.placeless() if name in weights]):
            self.notes["acts everywhere in part"] = names
        with regional(self.backbone, self.adapters, weights, [set(item.use) for item in passes], shares, rows=segments.rows,
                    size=segments.size, tokens=segments.tokens):
            return self._evaluate(step, joined(conds, shares), 1, segments=segments)

    def _base(self, step: Step) -> Float[Tensor, "1 B *S"]:
        """The base's own negative row, computed once for all that is asked of these latents."""
        if self._anchor is None or any(a is not b for a, b in zip(self._anchor[0], step, strict=True)):
            cond = self.encode(use={}).negative()
            self.adapters.use({})
            self._anchor = step, self._evaluate(step, cond, 1, negative=True)
        return self._anchor[1]

    # attention maps --------------------------------------------------------------------------------------------------

    @contextmanager
    def recording(
        self, step: Step, passes: Sequence[Pass], layers: Sequence[str], rows: Rows = "positive", *, early: bool = False
    ) -> Iterator[Callable[[], Float[Tensor, "N _R B L h w"]]]:
        """While it lasts, evaluations of these passes record what these layers attend to; yields what reads it.

        rows: of the maps, of the guidance rows that the passes have; anchored, the positive one, in which LoRAs act. early: an evaluation
        ends with AllRecorded once all are recorded.
        """
        count, pictures = passes[0].cond.rows, step.latents.shape[0]
        if self.anchored and count > 1:
            self._base(step)  # not among what is recorded
            count = 1
        level = self.backbone.prompt_attention()[layers[0]]

        def positive(total: int) -> list[int]:
            return [row for row in range(total) if row // pictures % count == count - 1]

        with recorded(self.backbone.denoiser, layers, grid=grid(step, level), rows=range if rows == "all" else positive, early=early,
                      joint=self.backbone.joint) as maps:
            yield lambda: maps.read().unflatten(0, (len(passes), -1, pictures))

    def attention_maps(
        self, step: Step, passes: Sequence[Pass], layers: Sequence[str], rows: Rows = "positive",
    ) -> Float[Tensor, "N R B L h w"]:
        """What each pass attends to: its prompt's tokens by place, averaged over these layers and their heads, float32.

        Each evaluation ends after the last of them. Differentiable in step.latents where gradients are on.
        """
        passes = _with("positive" if self.anchored else rows, passes)
        cost = self._share_until(tuple(layers), step, passes[0].cond)
        with self.recording(step, passes, layers, rows, early=True) as read:
            for item in passes:
                self.adapters.use(item.use)
                with suppress(AllRecorded):
                    self._evaluate(step, item.cond, cost)
            return read()

    # -----------------------------------------------------------------------------------------------------------------

    def scaled(self, step: Step) -> Float[Tensor, "B *S"]:
        """The latents as the denoiser reads them: flow samplers leave them as they are."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return scale(step.latents, step.t) if scale else step.latents

    def guide(self, rows: Float[Tensor, "R B *S"]) -> Float[Tensor, "B *S"]:
        """The request's classifier-free guidance over the rows."""
        return guide(rows, self.backbone.scale(self.request))

    @property
    def guided(self) -> bool:
        """Whether every prediction has a negative row."""
        return self._rows > 1

    @property
    def _rows(self) -> int:
        """R of a guided prediction."""
        return 2 if self.backbone.scale(self.request) > 1.0 else 1

    def _batched(self, step: Step) -> bool:
        """Whether rows of several LoRAs go in one batch: as the request says, but never where that is slower."""
        large = step.latents.shape[-1] * step.latents.shape[-2] > PROCESSOR_BATCH
        return self.request.batched and not (large and self.backbone.device.type == "cpu")

    def _several(
        self, step: Step, passes: Sequence[Pass], cost: float, *, skips: Callable[[str], bool] = _none,
    ) -> Float[Tensor, "N R B *S"]:
        """A prediction for each pass, in one batch of rows or one by one. cost: of each, in whole evaluations. skips: as of a `Call`."""
        if not self._batched(step) or len(passes) == 1:
            predictions = []
            for item in passes:
                self.adapters.use(item.use)
                predictions.append(self._evaluate(step, item.cond, cost, skips=skips))
            return torch.stack(predictions)
        rows = passes[0].cond.rows
        with self.adapters.rows([item.use for item in passes for _ in range(rows * step.latents.shape[0])]):
            stacked = Conditioning.stacked([item.cond for item in passes])
            out = self._evaluate(step, stacked, cost * len(passes), passes=len(passes), skips=skips)
            return out.unflatten(0, (len(passes), rows))

    def _share_until(self, layers: tuple[str, ...], step: Step, cond: Conditioning) -> float:
        """The cost of an evaluation that ends after these layers over a whole one, worked out once a run."""
        if layers not in self._shares:
            costs = layer_costs(self.backbone.denoiser, self.backbone.axis, grid(step, 0), cond.values["text"].shape[2])
            self._shares[layers] = share_until(costs, layers)
        return self._shares[layers]

    def _cached_share(self, cache: Cache, step: Step, cond: Conditioning) -> float:
        """A cached evaluation's cost over a whole one's, worked out once a run."""
        if cache not in self._shares:
            self._shares[cache] = cache.share(self.backbone.axis, tuple(step.latents.shape[-2:]), cond.values["text"].shape[2])
        return self._shares[cache]

    def _evaluate(
        self, step: Step, cond: Conditioning, predictions: float, *, passes: int = 1, segments: Segments | None = None,
        skips: Callable[[str], bool] = _none, negative: bool = False,
    ) -> Float[Tensor, "R B *S"]:
        """The denoiser, with the conditions that act at this step. predictions: how many of all guidance rows it counts for, in part where it
        has not all of them; the others as of a `Call`."""
        self.check_cancel()
        self._set_always(step)
        latents = self.scaled(step)
        total = self.notes.get("evaluations", 0) + predictions * cond.rows / (passes * self._rows)
        self.notes["evaluations"] = int(total) if total % 1 == 0 else total
        if self.conditions is None:
            return self.backbone.denoise(latents, step.t, cond)
        with self.conditions.acting(Call(step, latents, cond, passes, segments, skips, negative)):
            return self.backbone.denoise(latents, step.t, cond)

    def _set_always(self, step: Step) -> None:
        if self.always:
            self.adapters.use_always({name: lora.weight_at(step.index, step.count) for name, lora in self.always.items()})

    def check_cancel(self) -> None:
        """Raises Cancelled once that is asked for."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("cancelled before the next evaluation; nothing was kept")

    def _text_weight(self, name: str, weight: float) -> float:
        lora = self.loras[name]
        return weight if lora.text_weight is None else lora.text_weight * (weight / lora.weight)


def _with(rows: Rows, passes: Sequence[Pass]) -> list[Pass]:
    return [item._replace(cond=item.cond.positive()) for item in passes] if rows == "positive" else list(passes)
